"""The user's settings and their places: words of the command line and of a TOML file, alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.config import kohya
from library.config.fields import Declared
from library.config.options import SECRETS, declared_options
from library.config.other_files import refuse_other_file
from library.config.toml_file import read_toml
from library.errors import UserError, is_utf8

COMMAND_LINE = "command line"

# "--name" or "--name=value". A value may begin with "-" or be a number such as -1e-4, never with "--" and a letter.
_OPTION = re.compile(r"--(?P<name>[A-Za-z][\w.-]*)(?:=(?P<value>.*))?", re.DOTALL)
_SWALLOWED = re.compile(r"\s--(?P<name>[A-Za-z]\w*)(?=[\s=]|$)")
_SWALLOWED_BEHIND_A_QUOTE = re.compile(r"[\"']\s+--(?P<name>[A-Za-z]\w*)(?=[\s=]|$)")
# Word processors and chat programs turn -- into a dash.
_WITH_OTHER_DASHES = re.compile(r"[-‐‑‒–—―−]+(?P<name>[A-Za-z]\w*)(?:=.*)?", re.DOTALL)


@dataclass(frozen=True)
class Setting:
    """A name and its words, as the user spelt them. `place` begins each message about it."""

    name: str
    words: tuple[str, ...]
    place: str

    @property
    def from_command_line(self) -> bool:
        return self.place.startswith(COMMAND_LINE)


def places_of(message: str, places: Mapping[str, str]) -> str:
    """The places in files, a line each, of the options that `message` names; none for the command line."""
    named = dict.fromkeys(re.findall(r"--(\w+)", message))
    found = (places[name] for name in named if name in places)
    return "".join(f"\n  {place}" for place in found if not place.startswith(COMMAND_LINE))


def from_words(
    words: Sequence[str], options: Mapping[str, Declared] | None = None, *, leading: list[str] | None = None
) -> list[Setting]:
    """The settings on a command line. Raises UserError for a word that belongs to no option.

    options: those of the program, the trainer's by default. leading: the words before the first option are added to it;
    without it they are an error.
    """
    options = declared_options() if options is None else options
    collected: list[tuple[str, list[str]]] = []
    for word in words:
        if not is_utf8(word):
            raise UserError(f"{COMMAND_LINE}: {word!r} is not text in UTF-8")
        match = _OPTION.fullmatch(word)
        if match:
            value = match["value"]
            collected.append((match["name"], [] if value is None else [value]))
        elif word == "-h":
            collected.append(("help", []))
        elif (near := _WITH_OTHER_DASHES.fullmatch(word)) and near["name"] in options:
            raise UserError(f"{COMMAND_LINE}: '{word}': options begin with two hyphens: --{near['name']}")
        elif collected:
            collected[-1][1].append(word)
        elif leading is not None and not word.startswith("-"):
            leading.append(word)
        else:
            raise UserError(f"{COMMAND_LINE}: unexpected word '{word}': options begin with --")
    for name, values in collected:
        _refuse_swallowed(name, values, options)
    return [Setting(name, tuple(values), f"{COMMAND_LINE}: --{name}") for name, values in collected]


def without_secrets(words: Iterable[str]) -> list[str]:
    """A command line that may be written into a file: "(given)" stands for each value of a secret option."""
    shown, hidden = [], False
    for word in words:
        match = _OPTION.fullmatch(word)
        if match is None:
            shown.append("(given)" if hidden else word)
            continue
        hidden = match["name"] in SECRETS
        shown.append(f"--{match['name']}=(given)" if hidden and match["value"] is not None else word)
    return shown


def _refuse_swallowed(name: str, words: Iterable[str], options: Mapping[str, Declared]) -> None:
    """UserError for a word with further options in it: a quote is not closed where it should be.

    On Windows a backslash before a closing quote makes it a letter: "--train_data_dir=d:\\images\\" --resolution=64 is
    one word. In prose an option may be mentioned, but not behind a quote.
    """
    option = options.get(name)
    pattern = _SWALLOWED_BEHIND_A_QUOTE if option and option.details.free_text else _SWALLOWED
    for word in words:
        for match in pattern.finditer(word):
            if match["name"] in options or match["name"] in kohya.rows():
                raise UserError(
                    f"{COMMAND_LINE}: --{name}: its value '{word}' has swallowed --{match['name']}: a quote is missing "
                    'or one too many before it, or a backslash stands before the quote (on Windows \\" does not close)'
                )


def from_toml(path: Path) -> list[Setting]:
    """The settings in a TOML file, whatever its sections are called. Raises UserError."""
    settings: dict[str, Setting] = {}
    table = read_toml(path)
    refuse_other_file(table, path, "config_file")
    for section, content in table.items():
        if isinstance(content, dict):
            found = [_setting(key, value, f"{path}: [{section}] {key}") for key, value in content.items()]
        else:
            found = [_setting(section, content, f"{path}: {section}")]
        for setting in found:
            twin = settings.setdefault(setting.name, setting)
            if twin.words != setting.words:
                raise UserError(
                    f"{setting.place}: '{' '.join(setting.words)}', but {twin.place.removeprefix(f'{path}: ')} "
                    f"in the same file says '{' '.join(twin.words)}'"
                )
    return list(settings.values())


def _setting(key: str, value: object, place: str) -> Setting:
    if isinstance(value, dict):
        raise UserError(f"{place}: a table inside a section; sections are one level deep")
    if isinstance(value, list):
        # An empty list means "not given", as an empty string does.
        return Setting(key, tuple(_word(item, place) for item in value) or ("",), place)
    return Setting(key, (_word(value, place),), place)


def _word(value: object, place: str) -> str:
    """The word for which `value` stands on the command line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise UserError(f"{place}: {value!r} is neither text nor a number, true or false, nor a list of these")
