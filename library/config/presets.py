"""Presets: settings that ship with the program, each a TOML file in `configs/` whose first line says what it is for.

They are read like a file of the user's, below it: preset < config file < command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.config.settings import Setting, from_toml
from library.errors import UserError, did_you_mean

# Beside the packages, in a checkout and where the program is installed alike
FOLDER = Path(__file__).parents[2] / "configs"
_MARK = "# Preset: "  # the other files there are examples, which name data


@dataclass(frozen=True)
class Preset:
    """`description`: one line."""

    name: str
    path: Path
    description: str


def presets() -> dict[str, Preset]:
    """All presets by name."""
    found = {}
    for path in sorted(FOLDER.glob("*.toml")):
        with path.open(encoding="utf-8") as file:
            first = file.readline()
        if first.startswith(_MARK):
            found[path.stem] = Preset(path.stem, path, first.removeprefix(_MARK).strip())
    return found


def listing() -> str:
    """The names and descriptions, for people."""
    known = presets()
    width = max(map(len, known), default=0)
    lines = [f"{preset.name:<{width}}  {preset.description}" for preset in known.values()]
    return "\n".join([*lines, "", f"--preset NAME uses one; several are layered. What they set, and why: {FOLDER}", ""])


def settings_of(names: Iterable[str], *, where: str) -> list[Setting]:
    """The settings of these presets, in their order. Raises UserError for an unknown name, with the nearest one."""
    known = presets()
    settings: list[Setting] = []
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            own = "; give a file of your own as --config_file" if name.endswith(".toml") else ""
            raise UserError(f"{where}: no preset '{name}'{hint}{own}")
        settings += from_toml(shown_path(known[name].path))
    return settings


def layered(*layers: Sequence[Setting]) -> list[Setting]:
    """The settings of the files and the command line, the last layer winning, with those of their presets below."""
    named = [[setting for setting in layer if setting.name == "preset"] for layer in layers]
    chosen = next((layer for layer in reversed(named) if layer), [])
    below: list[Setting] = []
    for setting in chosen:  # --preset a --preset b is --preset a b
        below += settings_of(filter(None, setting.words), where=setting.place)
    together = tuple(word for setting in chosen for word in setting.words)
    if chosen and not together:
        raise UserError(f"{chosen[-1].place}: needs the name of a preset; --list_presets says which there are")
    rest = [setting for layer in layers for setting in layer if setting.name != "preset"]
    return [*below, *rest, *(Setting("preset", together, setting.place) for setting in chosen[-1:])]


def shown_path(path: Path) -> Path:
    """The path as a message should name it: short where the file is below the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
