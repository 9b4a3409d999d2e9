"""How one option is declared, and how the words that a user gave for it become its value.

An option is a field of a frozen dataclass, made by `option(default, help=…)`. Its annotation is its type: bool, int,
float, str, Path, a `Literal` of choices, a tuple of one of these (a list of words), each also `| None`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from library.errors import did_you_mean

logger = logging.getLogger(__name__)


T = TypeVar("T")

REQUIRED: Any = dataclasses.MISSING  # the default of an option that must be given, whatever its type
BALANCES = ("smallest", "equal")  # how folders share the draws, beside weights
MAX_SIDE = 16384  # pixels of an image to train on or to render; a larger number is a typing mistake


class BadValue(Exception):
    """A value that does not fit its option. The message says why; the caller adds the place."""


class OutOfRange(BadValue):
    """A number beyond the bounds of its option. It is no error where other options leave that one without effect."""


class ControlCharacters(BadValue):
    """A path or name that contains a tab or the like: in a file, a backslash in double quotes becomes one."""

    in_a_file = "in double quotes \\t is a tab and \\n a line break: write paths with /, in TOML also in single quotes"


class Unset:
    """The type of `UNSET`: the value of an option that is given but empty, such as `vae = ""`; the default holds."""


UNSET = Unset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Details:
    """The details of an option beyond its annotation and default; see `option`."""

    help: str
    minimum: float | None = None
    maximum: float | None = None
    zero_is_unset: bool = False
    not_yet: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    alone: str | None = None
    joined_by: str | None = None
    read: Callable[[str], object] | None = None
    free_text: bool = False


def option(
    default: T,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    zero_is_unset: bool = False,
    not_yet: Sequence[str] | Mapping[str, str] = (),
    aliases: tuple[str, ...] = (),
    alone: str | None = None,
    joined_by: str | None = None,
    read: Callable[[str], object] | None = None,
    free_text: bool = False,
) -> T:
    """Declare an option as a dataclass field. With REQUIRED as its default it must be given.

    `minimum`, `maximum`: inclusive bounds. `zero_is_unset`: 0 is a way to say "off". `not_yet`: kohya's values that
    are not supported yet, with what to use instead where there is something. `aliases`: other names for it. `alone`:
    the value that `--name` has without a word behind it. `joined_by`: a TOML list is the same as its items joined by
    this. `read`: turns the word into the value, or raises BadValue, where the annotation does not say how.
    `free_text`: prose, in which anything may stand; other text is a path or a name, and holds no control characters.
    """
    details = Details(
        help=help,
        minimum=minimum,
        maximum=maximum,
        zero_is_unset=zero_is_unset,
        not_yet=not_yet if isinstance(not_yet, Mapping) else dict.fromkeys(not_yet, ""),
        aliases=aliases,
        alone=alone,
        joined_by=joined_by,
        read=read,
        free_text=free_text,
    )
    return dataclasses.field(default=default, metadata={"option": details})


@dataclasses.dataclass(frozen=True)
class Declared:
    """An option as declared: `kind` is bool, int, float, str or Path; `many` if it takes a list of words."""

    name: str
    kind: type
    many: bool
    choices: tuple[str, ...]
    default: object
    details: Details

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


def declared(group: type) -> dict[str, Declared]:
    """The options of a dataclass, in the order in which they are written. Fields not made by `option` are left out."""
    hints = get_type_hints(group)
    return {
        field.name: _declared(field, hints[field.name])
        for field in dataclasses.fields(group)
        if "option" in field.metadata
    }


def by_any_name(options: Mapping[str, Declared]) -> dict[str, str]:
    """The name of each option, by its name and by its aliases."""
    return {alias: name for name, item in options.items() for alias in (name, *item.details.aliases)}


def lacking(options: Mapping[str, Declared], given: Collection[str], *, also: Collection[str] = ()) -> dict[str, str]:
    """By name, a message for each option that must be given and is not. `also`: more of those than are declared so."""
    return {
        name: f"--{name} is required: {item.details.help}"
        for name, item in options.items()
        if (item.required or name in also) and name not in given
    }


def made(group: type[T], values: Mapping[str, object]) -> T:
    """An object of a dataclass of options. `values`: by option, those that are given; also of other dataclasses."""
    return group(**{name: values[name] for name in declared(group) if name in values})


def _declared(field: dataclasses.Field[object], annotation: object) -> Declared:
    annotation = _without_none(annotation)
    details: Details = field.metadata["option"]
    many = get_origin(annotation) is tuple and details.read is None
    if many:
        annotation = get_args(annotation)[0]
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    kind = str if choices or details.read else annotation
    assert kind in (bool, int, float, str, Path), f"option {field.name}: no rule for {annotation}"
    return Declared(field.name, kind, many, choices, field.default, details)


def _without_none(annotation: object) -> object:
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [item for item in get_args(annotation) if item is not type(None)]
        return rest[0] if len(rest) == 1 else Union[tuple(rest)]  # noqa: UP007 - built at run time
    return annotation


def convert(item: Declared, words: tuple[str, ...]) -> object:
    """The value of `item` for these words, or UNSET if they are empty. Raises BadValue."""
    if not words:
        if item.kind is bool:
            return True
        if item.details.alone is not None:
            return item.details.alone
        if item.many:
            return UNSET
        raise BadValue("needs a value")
    if item.many:
        values = tuple(_one(item, word) for word in words if word)
        return values if values else UNSET
    if len(words) > 1:
        if item.details.joined_by is None:
            raise BadValue(f"takes one value, not {len(words)}: {', '.join(map(repr, words))}")
        words = (item.details.joined_by.join(words),)
    return UNSET if words[0] == "" else _one(item, words[0])


def _one(item: Declared, word: str) -> object:
    details = item.details
    if details.read is not None:
        try:
            value = details.read(word)
        except BadValue as error:
            raise (OutOfRange(str(error)) if _is_number(word.removesuffix("%")) else error) from None
        if not item.choices or not isinstance(value, str):
            return value
        word = value
    if details.alone is not None and is_truth(word):
        return details.alone if read_bool(word) else UNSET
    if item.choices:
        return _choice(item, word)
    if item.kind is bool:
        return read_bool(word)
    if item.kind is str:
        if word in details.not_yet:
            hint = f" ({details.not_yet[word]})" if details.not_yet[word] else ""
            raise BadValue(f"'{word}' is known to kohya's scripts, not supported here yet{hint}")
        if not details.free_text:
            refuse_control_characters(word)
        return word
    if item.kind is Path:
        refuse_control_characters(word)
        return Path(word)
    number = read_int(word) if item.kind is int else read_float(word)
    if number == 0 and details.zero_is_unset:
        return UNSET
    if details.minimum is not None and number < details.minimum:
        raise OutOfRange(f"must be at least {details.minimum:g}, not {word}")
    if details.maximum is not None and number > details.maximum:
        raise OutOfRange(f"must be at most {details.maximum:g}, not {word}")
    return number


_CONTROL = {
    "\t": "a tab", "\n": "a line break", "\r": "a carriage return", "\b": "a backspace", "\f": "a form feed",
    "\0": "a null character",
}  # fmt: skip


def control_characters(word: str) -> list[str]:
    """The control characters in `word`, each once: for "D:\\train" in a file, the tab that its \\t becomes."""
    return list(dict.fromkeys(letter for letter in word if ord(letter) < 32 or ord(letter) == 127))


def refuse_control_characters(word: str) -> None:
    """Raises ControlCharacters if there are any in `word`."""
    if found := control_characters(word):
        named = " and ".join(_CONTROL.get(letter, f"the character {letter!r}") for letter in found)
        raise ControlCharacters(f"{word!r} contains {named}, which no name or path should")


def _choice(item: Declared, word: str) -> str:
    if word in item.choices:
        return word
    supported = ", ".join(choice for choice in item.choices if choice)
    if word in item.details.not_yet:
        raise BadValue(f"'{word}' is known to kohya's scripts, not supported here yet (supported: {supported})")
    near = did_you_mean(word, (*item.choices, *item.details.not_yet))
    raise BadValue(f"'{word}' is not one of {supported}{near}")


def is_truth(word: str) -> bool:
    """Whether the word is a way to write true or false."""
    return word.lower() in ("true", "false", "1", "0")


def read_bool(word: str) -> bool:
    """true, false, 1 or 0 in any case."""
    if not is_truth(word):
        raise BadValue(f"'{word}' is neither true nor false")
    return word.lower() in ("true", "1")


def read_int(word: str) -> int:
    """A whole number; 1e3 and 8.0 are such numbers, too."""
    try:
        return int(word)
    except ValueError:
        pass
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number != int(number):
        raise BadValue(f"'{word}' is not a whole number")
    return int(number)


def read_float(word: str) -> float:
    """A finite number."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadValue(f"'{word}' is not a number")
    return number


def read_resolution(word: str) -> tuple[int, int]:
    """(width, height) in pixels from "512", "512,768" or "512x768"."""
    sizes = [size.strip() for size in word.lower().replace("x", ",").split(",")]
    if len(sizes) > 2 or not all(size.isdecimal() and len(size) < 20 and int(size) > 0 for size in sizes):
        raise BadValue(f"'{word}' is not a size in pixels such as 512 or 512,768 (width,height)")
    if max(int(size) for size in sizes) > MAX_SIDE:
        raise BadValue(f"'{word}' is more than {MAX_SIDE} pixels")
    return int(sizes[0]), int(sizes[-1])


def read_resolutions(word: str) -> tuple[tuple[int, int], ...]:
    """Sizes with commas between them, each as "512" or "512x768", none of them twice."""
    sizes = tuple(read_resolution(part) for part in word.split(","))
    if twice := [f"{width}x{height}" for width, height in sizes if sizes.count((width, height)) > 1]:
        raise BadValue(f"'{word}' has {twice[0]} twice")
    return sizes


def read_skipped_resolution(word: str) -> tuple[int, int] | Unset:
    """The same, or 0 for none."""
    return UNSET if word.strip() == "0" else read_resolution(word)


def read_range(word: str) -> tuple[float, float]:
    """Two numbers above 0 with a comma between, the smaller first: "2.0,4.0"."""
    ends = [float(end) if _is_number(end) else math.nan for end in word.split(",")]
    if len(ends) != 2 or not 0 < ends[0] <= ends[1] < math.inf:
        raise BadValue(f"'{word}' is not a range such as 2.0,4.0")
    return ends[0], ends[1]


def read_share(word: str) -> float:
    """A part of all draws, above 0 and below 1."""
    try:
        number = read_float(word)
    except BadValue:
        number = math.nan
    if not 0 < number < 1:
        hint = ""
        if number == 0:
            hint = "; num_repeats = 0 leaves a folder out"
        elif 1 < number < 100:
            hint = f"; {number:g} % is {number / 100:g}"
        raise BadValue(f"{word} is not a share, which is a number above 0 and below 1{hint}")
    return number


def read_balance(word: str) -> str:
    """ "smallest", "equal", or weights above 0 with commas between them, such as 2,1,1."""
    if word in BALANCES:
        return word
    try:
        weights = [read_float(part) for part in word.split(",")]
    except BadValue:
        near = did_you_mean(word, BALANCES)
        raise BadValue(f"'{word}' is neither smallest nor equal, nor weights such as 2,1,1{near}") from None
    if not all(0 < weight < math.inf for weight in weights):
        raise BadValue(f"'{word}': weights must be above 0; num_repeats = 0 leaves a folder out")
    return word


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def read_steps(word: str) -> int | float | str:
    """Steps (500), a ratio of all steps below 1 (0.05) or a percentage of them ("5%", which stays text)."""
    try:
        number = float(word.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise BadValue(f"'{word}' is neither a number of steps, nor a ratio below 1, nor a percentage such as 5%")
    if word.endswith("%"):
        if number > 100:
            raise BadValue(f"'{word}' is more than all steps")
        return word
    if 0 < number < 1:
        return number
    return read_int(word)


def read_blocks(word: str) -> int | str | Unset:
    """A number of blocks (20), a percentage of them ("50%", which stays text), or 0 for none."""
    number = read_float(word.removesuffix("%"))
    if number < 0 or (word.endswith("%") and number > 100):
        raise BadValue(f"'{word}' is neither a number of blocks nor a percentage from 0% to 100%")
    if number == 0:
        return UNSET
    return word if word.endswith("%") else read_int(word)


def read_schedule(word: str) -> str:
    """The name of a schedule. The rate in kohya's "adafactor:1e-3" is only shown before the first step: ignored."""
    name, colon, rate = word.partition(":")
    if colon and name == "adafactor":
        read_float(rate)
        return name
    return word


_MEMORY_UNITS = {
    "b": 1,
    **{f"{letter}{middle}b": 1024**power for power, letter in enumerate("kmgt", 1) for middle in ("", "i")},
}


def memory_bytes(word: str) -> int:
    """Bytes of "8GB" or "12GiB". Both mean 1024³: so are the memories of graphics cards named. Raises BadValue."""
    text = word.strip().lower().replace(" ", "")
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(digits) :]
    if not _is_number(digits) or not 0 < float(digits) < math.inf:
        raise BadValue(f"'{word}' is not a size of memory such as 8GB")
    if unit not in _MEMORY_UNITS:
        near = f", did you mean '{digits}{_nearest_unit(unit)}'?"
        raise BadValue(f"'{word}' has {'no unit' if not unit else f'an unknown unit, {unit}'}{near}")
    return int(float(digits) * _MEMORY_UNITS[unit])


def _nearest_unit(unit: str) -> str:
    """The unit with the same first letter; GB, in which cards are measured, for none."""
    names = {"k": "KB", "m": "MB", "g": "GB", "t": "TB", "b": "B"}
    return names.get(unit[:1], "GB")


def read_memory(word: str) -> str:
    """A size of memory, as it was given."""
    memory_bytes(word)
    return word.strip()


def read_fit(word: str) -> str:
    """The same, or "auto"."""
    return "auto" if word.strip().lower() == "auto" else read_memory(word)


def read_token_length(word: str) -> int:
    """75, 150 or 225 tokens of a caption. 255, which a GUI offers by mistake, is taken as 225."""
    if word == "255":
        logger.warning("max_token_length 255: CLIP's tokens come in chunks of 75, so the longest length, 225, is used.")
        return 225
    if word not in ("75", "150", "225"):
        raise BadValue(f"'{word}' is not one of 75, 150, 225")
    return int(word)
