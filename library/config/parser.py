"""From a command line, the presets and the TOML file that it names, to `Options`.

All are read into one list of settings, the presets' first and then the file's, and one pass checks them all, so the
command line wins and nothing is checked twice. `argparse` prints the help. It does not read the words, because it
cannot say in which file and section a word stood, stops at the first mistake, and takes -1e-4 for an option.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.config import kohya, presets
from library.config.fields import (
    UNSET,
    BadValue,
    ControlCharacters,
    Declared,
    OutOfRange,
    by_any_name,
    convert,
    declared,
    lacking,
    made,
)
from library.config.idle import idle
from library.config.options import SECRETS, Options, declared_options, option_groups
from library.config.settings import Setting, from_toml, from_words, places_of, without_secrets
from library.config.toml_file import write_toml
from library.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

# Options of the command line only: they name files to read or write.
_COMMAND_LINE_ONLY = ("config_file", "output_config", "list_presets")
_TWO_WAYS = {"resolution": "resolutions", "resolutions": "resolution"}


def parse(argv: list[str], *, required: Collection[str] = ()) -> Options:
    """The options of a run. Raises UserError, which names every mistake that was found, one a line.

    `required`: names of options that must be given, beside those without a default.
    `--help`, `--list_presets` and `--output_config` do their work and raise SystemExit(0).
    """
    settings = from_words(argv)
    if any(setting.name == "help" for setting in settings):
        help_parser().print_help()
        raise SystemExit(0)
    # the options that are needed before the files are read; all settings are checked once, later, with the files'
    reading = _read(setting for setting in settings if _without_no(setting).name in _COMMAND_LINE_ONLY)
    reading.refuse()
    if reading.values.get("list_presets"):
        sys.stdout.write(presets.listing())
        raise SystemExit(0)
    config_path = _config_path(reading)
    if reading.values.get("output_config"):
        reading = _read(presets.layered(settings))
        reading.refuse()
        _judge_out_of_range(reading, {})
        _write_config(config_path, reading)
        raise SystemExit(0)
    reading = _read(presets.layered([] if config_path is None else from_toml(config_path), settings))
    reading.refuse()
    options = _options(reading, command=without_secrets(argv), required=required)
    _judge_out_of_range(reading, idle(options))
    for warning in reading.warnings:
        logger.warning("%s", warning)
    return options


def help_parser() -> argparse.ArgumentParser:
    """The options as `--help` shows them."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config_file FILE.toml] [--option value ...]",
        description="Train a LoRA. Every option can stand in the TOML file as well; the command line wins. "
        "--no-flag takes back a --flag of the file.",
        allow_abbrev=False,
    )
    for group_name, group in option_groups().items():
        section = parser.add_argument_group((group.__doc__ or group_name).strip())
        for item in declared(group).values():
            add_argument(section, item)
    return parser


def add_argument(section: argparse._ArgumentGroup, item: Declared) -> None:
    """Add a declared option to the help."""
    text = item.details.help.replace("%", "%%")
    if item.kind is bool:
        name = f"--no-{item.name}" if item.default else f"--{item.name}"
        section.add_argument(name, action="store_true", help=f"do not {text}" if item.default else text)
        return
    if item.required:
        text += " (required)"
    elif item.default not in (None, "", ()):
        text += f" (default: {item.default})"
    choices = "{" + ",".join(choice for choice in item.choices if choice) + "}"
    plain = {int: "N", float: "X", str: "TEXT", Path: "FILE"}[item.kind]
    nargs = "*" if item.many else "?" if item.details.alone else None
    section.add_argument(f"--{item.name}", nargs=nargs, metavar=choices if item.choices else plain, help=text)


@dataclass
class _Reading:
    """The results of one pass over the settings: values by option, the place of each, problems and warnings.

    out_of_range: by option, numbers that are errors unless that option has no effect, with the place of each.
    """

    values: dict[str, object] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    out_of_range: dict[str, tuple[str, str]] = field(default_factory=dict)

    def refuse(self) -> None:
        """Raise UserError if anything is wrong."""
        if self.problems:
            raise UserError("\n".join([*self.problems, *map(": ".join, self.out_of_range.values())]))


def _read(settings: Iterable[Setting]) -> _Reading:
    """Check every setting; of two for one name, the later wins."""
    options = declared_options()
    names = by_any_name(options)
    reading = _Reading()
    others: dict[str, Setting] = {}
    for setting in map(_without_no, settings):
        name = names.get(setting.name)
        if name is None:
            others[setting.name] = setting
            continue
        if name in _COMMAND_LINE_ONLY and not setting.from_command_line:
            reading.warnings.append(f"{setting.place}: has no effect: it works on the command line only")
            continue
        reading.values.pop(name, None)
        reading.places.pop(name, None)
        reading.out_of_range.pop(name, None)
        try:
            value = convert(options[name], setting.words)
        except OutOfRange as error:
            reading.out_of_range[name] = setting.place, str(error)
            continue
        except BadValue as error:
            escaped = isinstance(error, ControlCharacters) and not setting.from_command_line
            reading.problems.append(f"{setting.place}: {error}" + f"; {ControlCharacters.in_a_file}" * escaped)
            continue
        if value is not UNSET:
            reading.values[name] = value
            reading.places[name] = setting.place
            _replace_the_other(name, reading)
    rows = kohya.rows()
    asked = {name for name, item in others.items() if name in rows and not rows[name].asks_for_nothing(item.words)}
    for setting in others.values():
        _judge(setting, reading, asked)
    return reading


def _replace_the_other(name: str, reading: _Reading) -> None:
    """Of two options that say the same in two ways, the one of the later file, or of the command line, wins."""
    other = _TWO_WAYS.get(name)
    if other in reading.places and _source(reading.places[other]) != _source(reading.places[name]):
        del reading.values[other], reading.places[other]


def _source(place: str) -> str:
    """The file, or the command line."""
    return place.partition(": ")[0]


def _without_no(setting: Setting) -> Setting:
    """`--no-flag` is `--flag=false`."""
    name = setting.name.removeprefix("no-")
    if name == setting.name or setting.words:
        return setting
    item, row = declared_options().get(name), kohya.rows().get(name)
    is_flag = item.kind is bool if item else row is not None and row.kind == "flag"
    return Setting(name, ("false",), setting.place) if is_flag else setting


def _judge(setting: Setting, reading: _Reading, asked: Collection[str]) -> None:
    """Deal with a name that is not implemented. `asked`: see `kohya.judge`."""
    if setting.name not in kohya.rows():
        known = [*declared_options(), *(name for name in kohya.rows() if name not in kohya.TOOLS)]
        reading.problems.append(f"{setting.place}: unknown option{did_you_mean(setting.name, known)}")
        return
    verdict = kohya.judge(setting.name, setting.words, given=reading.places, asked=asked)
    shown = f" = {' '.join(setting.words)}" if setting.words else ""
    if verdict.error:
        reading.problems.append(f"{setting.place}{shown}: {verdict.error}")
    if verdict.warning:
        reading.warnings.append(f"{setting.place}{shown}: {verdict.warning}")


def _config_path(reading: _Reading) -> Path | None:
    """The file that --config_file names, whose ending may be left out."""
    name = reading.values.get("config_file")
    if name is None:
        return None
    assert isinstance(name, str), "the option's type"
    if not name.endswith(".toml") and os.path.isfile(name) and not os.path.exists(f"{name}.toml"):
        raise UserError(
            f"command line: --config_file {name}: a config file is TOML, and its name ends with .toml; what a GUI "
            "saves for itself (JSON, YAML) has other names for many options: let it print the command, or write TOML"
        )
    return Path(name if name.endswith(".toml") else f"{name}.toml")


def _options(reading: _Reading, *, command: Iterable[str], required: Collection[str]) -> Options:
    missing = [
        text + _stands_in(name, reading)
        for name, text in lacking(declared_options(), reading.values, also=required).items()
    ]
    if missing:
        raise UserError("\n".join([*missing, *map(": ".join, reading.out_of_range.values())]))
    try:
        groups: dict[str, Any] = {name: made(group, reading.values) for name, group in option_groups().items()}
        return Options(**groups, given=reading.places, command=tuple(command))
    except UserError as error:
        told = [f"{error}{places_of(str(error), reading.places)}", *map(": ".join, reading.out_of_range.values())]
        raise UserError("\n".join(told)) from None


def _judge_out_of_range(reading: _Reading, idle: Mapping[str, str]) -> None:
    """Raise UserError for numbers out of range. Those of options without effect get a warning: kohya's scripts never
    look at them. `idle`: these, each with the words that follow "has no effect"."""
    for name, (place, problem) in reading.out_of_range.items():
        if name in idle:
            reading.warnings.append(f"{place}: {problem}, but it has no effect{idle[name]}")
        else:
            reading.problems.append(f"{place}: {problem}")
    if reading.problems:
        raise UserError("\n".join(reading.problems))


def _stands_in(name: str, reading: _Reading) -> str:
    """A hint where a missing option is in the text of another: a quote was forgotten."""
    for other, value in reading.values.items():
        if any(f"--{name}" in str(word) for word in (value if isinstance(value, tuple) else (value,))):
            return f" (it stands in the value of --{other}: look at the quotes)"
    return ""


def _write_config(path: Path | None, reading: _Reading) -> None:
    """Write the values that differ from the defaults, as kohya's scripts read them, too. Presets are resolved."""
    if path is None:
        raise UserError("--output_config needs --config_file, the file to write")
    if os.path.exists(path):
        raise UserError(f"{path}: exists already; --output_config writes to a new file")
    options = declared_options()
    written = {
        name: _plain(value, options[name])
        for name, value in reading.values.items()
        if name not in (*_COMMAND_LINE_ONLY, *SECRETS, "preset") and value != options[name].default
    }
    write_toml(path, written)
    logger.info("%s written with %d options.", path, len(written))


def _plain(value: object, item: Declared) -> object:
    if item.details.joined_by is not None and isinstance(value, tuple):
        words = ("x".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in value)  # --resolutions
        return item.details.joined_by.join(words)
    return list(value) if isinstance(value, tuple) else value
