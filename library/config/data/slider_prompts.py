"""The prompts of a slider: the TOML file of `--prompts_file`, in kohya's forms.

Either `[[prompts]]`, each a `target` to train with the prompts of its aim, or `targets` (at the top or in `[slider]`),
whose `positive` and `negative` prompts are the ends of an axis: `axis` makes the settings of both directions of them.
A key above the items is the default of all. Every setting is one `Setting`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from library.config.fields import MAX_SIDE
from library.config.other_files import refuse_other_file
from library.config.toml_file import read_text, read_toml
from library.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

Table = Mapping[str, Any]
Action = Literal["erase", "enhance"]
LARGEST_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One thing to train: with the LoRA at `multiplier` the prediction for `target` becomes the base model's

        neutral - guidance_scale · (positive - unconditional)      to "erase", with + to "enhance".

    `size`: width and height in pixels; `dynamic_resolution`: at most that. `place`: begins messages about it.
    """

    target: str
    positive: str
    unconditional: str
    neutral: str
    action: Action = "erase"
    guidance_scale: float = 1.0
    size: tuple[int, int] = (512, 512)
    dynamic_resolution: bool = False
    batch_size: int = 1
    dynamic_crops: bool = False
    multiplier: float = 1.0
    weight: float = 1.0
    place: str = field(default="", compare=False)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The different prompts, the target first."""
        return tuple(dict.fromkeys((self.target, self.positive, self.neutral, self.unconditional)))

    @property
    def facts(self) -> dict[str, object]:
        """Everything that the training depends on."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.compare}


_COMMON = ("guidance_scale", "resolution", "dynamic_resolution", "batch_size", "dynamic_crops", "multiplier", "weight")
_OF_PROMPT: tuple[str, ...] = ("target", "positive", "unconditional", "neutral", "action", *_COMMON)
_NEUTRALS = ("neutrals", "neutral_prompt_file", "prompt_file")
_OF_AXIS: tuple[str, ...] = ("target_class", "positive", "negative", "neutral", *_NEUTRALS, "resolutions", *_COMMON)
_FILES = ("neutral_prompt_file", "prompt_file")


def read_settings(path: Path) -> tuple[Setting, ...]:
    """The settings of a file, in order. Raises UserError, which names the place."""
    if path.suffix.lower() in (".yaml", ".yml"):
        raise UserError(f"--prompts_file {path}: is YAML; the file is TOML, with the same names")
    content = read_toml(path)
    if not content:
        raise UserError(f"--prompts_file {path}: is empty")
    refuse_other_file(content, path, "prompts_file")
    found = tuple(_settings(content, path))
    if not found:
        raise UserError(f"--prompts_file {path}: holds no prompt")
    for setting, count in Counter(found).items():
        if count > 1:
            logger.warning("%s: stands %d times in the file, and counts as often", setting.place, count)
    return found


def _settings(content: Table, path: Path) -> Iterator[Setting]:
    if "prompts" in content:
        _known(content, ("prompts", *_OF_PROMPT), f"{path}")
        defaults = {name: value for name, value in content.items() if name in _OF_PROMPT}
        for number, item in enumerate(_tables(content["prompts"], f"{path}: prompts"), 1):
            place = f"{path}, prompt {number}"
            common = {name: value for name, value in defaults.items() if name in _OF_AXIS or "target_class" not in item}
            yield from _item(common, item, place, path)
        return
    where, level = f"{path}", content
    if "slider" in content:
        _known(content, ("slider",), where)
        where = f"{path}, [slider]"
        level = next(_tables([content["slider"]], where))
    if "targets" not in level:
        if not level.keys() & {"target", "target_class"}:
            names = ("prompts", "slider", "targets", *_OF_PROMPT, *_OF_AXIS)
            _known(level, names, where)
            raise UserError(f"{where}: has neither [[prompts]] nor targets, nor a target or target_class of its own")
        yield from _item({}, level, where, path)
        return
    defaults = {name: value for name, value in level.items() if name != "targets"}
    _known(defaults, (*_OF_PROMPT, *_OF_AXIS), where)
    for number, item in enumerate(_tables(level["targets"], f"{where}: targets"), 1):
        names = _OF_PROMPT if "target" in item else _OF_AXIS
        common = {name: value for name, value in defaults.items() if name in names}
        yield from _item(common, item, f"{where}, target {number}", path)


def _tables(value: object, where: str) -> Iterator[Table]:
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise UserError(f"{where}: must be tables, such as [[prompts]]")
    if not value:
        raise UserError(f"{where}: is empty")
    return iter(value)


def _known(table: Table, names: Iterable[str], where: str) -> None:
    """UserError for a key that is none of `names`, with the nearest one."""
    for key in table:
        if key not in names:
            raise UserError(f"{where}: unknown key '{key}'{did_you_mean(key, tuple(names)) or _listed(names)}")


def _listed(names: Iterable[str]) -> str:
    return f"; there are {', '.join(dict.fromkeys(names))}"


def _item(defaults: Table, item: Table, place: str, path: Path) -> Iterator[Setting]:
    """The settings of one item: one, or those of an axis."""
    if "target_class" in item:
        _known(item, _OF_AXIS, place)
        yield from _of_axis(defaults, item, place, path)
        return
    if "target" not in item and {"positive", "negative"} <= item.keys():
        raise UserError(f"{place}: lacks target_class, the prompt whose pictures move along the axis")
    _known(item, _OF_PROMPT, place)
    if "target" not in item and "target" not in defaults:
        raise UserError(f"{place}: lacks target, the prompt to train")
    yield _of_prompt({**defaults, **item}, place)


def _of_prompt(table: Table, place: str) -> Setting:
    target = _text(table, "target", place)
    unconditional = _text(table, "unconditional", place)
    action = _text(table, "action", place, default="erase")
    if action not in ("erase", "enhance"):
        hint = did_you_mean(action, ("erase", "enhance"))
        raise UserError(f"{place}: action '{action}': must be erase or enhance{hint}")
    setting = Setting(
        target=target,
        positive=_text(table, "positive", place, default=target),
        unconditional=unconditional,
        neutral=_text(table, "neutral", place, default=unconditional),
        action="erase" if action == "erase" else "enhance",
        size=_size(table.get("resolution", 512), f"{place}: resolution"),
        place=place,
        **_numbers(table, place),
    )
    if setting.positive == setting.unconditional:
        raise UserError(
            f"{place}: positive and unconditional are both {setting.positive!r}: their difference, which the LoRA is "
            "taught, is nothing"
        )
    if not setting.guidance_scale and setting.neutral == setting.target:
        raise UserError(f"{place}: guidance_scale 0, and neutral is the target itself: nothing would be trained")
    return setting


def _numbers(table: Table, place: str) -> dict[str, Any]:
    """The values that all items have but the resolution."""
    multiplier = _number(table, "multiplier", place)
    if not multiplier:
        raise UserError(f"{place}: multiplier 0: the LoRA has no effect there, and nothing could be trained")
    weight, guidance = _number(table, "weight", place), _number(table, "guidance_scale", place)
    for name, value in (("weight", weight), ("guidance_scale", guidance)):
        if value < 0:
            raise UserError(f"{place}: {name} {value:g}: must be at least 0")
    batch_size = table.get("batch_size", 1)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= LARGEST_BATCH:
        raise UserError(f"{place}: batch_size {batch_size!r}: must be a whole number, 1 … {LARGEST_BATCH}")
    flags = {name: _flag(table, name, place) for name in ("dynamic_resolution", "dynamic_crops")}
    return {
        "guidance_scale": guidance,
        "batch_size": batch_size,
        "multiplier": multiplier,
        "weight": weight,
        **flags,
    }


# -- an axis


def _of_axis(defaults: Table, item: Table, place: str, path: Path) -> Iterator[Setting]:
    merged = {**defaults, **item}
    target = _text(merged, "target_class", place)
    positive, negative = (_text(merged, name, place).strip() for name in ("positive", "negative"))
    if not positive and not negative:
        raise UserError(f"{place}: needs positive or negative, the prompt at one end of the axis, or both")
    if positive == negative:
        raise UserError(f"{place}: positive and negative are both {positive!r}: there is no axis between them")
    neutrals = _neutrals(defaults, item, place, path)
    if target not in neutrals:
        logger.warning(
            "%s: neutral is %r and target_class %r: the part of their difference that both directions share is taught "
            "with both signs, and cancels; neutral = %r trains the axis alone",
            *(place, neutrals[0], target, target),
        )
    for neutral in neutrals:
        for size in _sizes(merged, place):
            yield from axis(
                Setting(
                    target=target,
                    positive=positive,
                    unconditional=negative,
                    neutral=neutral,
                    size=size,
                    place=place,
                    **_numbers(merged, place),
                )
            )


def axis(ends: Setting) -> list[Setting]:
    """The settings of both directions, from one whose positive and unconditional prompts are the ends.

    Both ends given: each direction once as the enhanced difference and once as the erased opposite. One end: once.
    """
    positive, negative = ends.positive, ends.unconditional
    pairs: list[tuple[Action, str, str, int]]
    if positive and negative:
        pairs = [("erase", negative, positive, 1), ("enhance", positive, negative, 1)]
        pairs += [("erase", positive, negative, -1), ("enhance", negative, positive, -1)]
    elif negative:
        pairs = [("erase", negative, "", 1), ("enhance", negative, "", -1)]
    else:
        pairs = [("enhance", positive, "", 1), ("erase", positive, "", -1)]
    return [
        replace(ends, action=action, positive=plus, unconditional=minus, multiplier=sign * ends.multiplier)
        for action, plus, minus, sign in pairs
    ]


def _neutrals(defaults: Table, item: Table, place: str, path: Path) -> list[str]:
    """The item's own neutral prompts, else those above it; each makes settings of its own."""
    for table in (item, defaults):
        found: list[str] = []
        for name in _NEUTRALS:
            if name in table:
                found += _lines(path.parent / _text(table, name, place), name, place) if name in _FILES else []
                found += _texts(table[name], f"{place}: {name}") if name == "neutrals" else []
        if found:
            return list(dict.fromkeys(found))
        if "neutral" in table:
            return [_text(table, "neutral", place)]
    return [""]


def _lines(file: Path, name: str, place: str) -> list[str]:
    try:
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    except UserError as error:
        raise UserError(f"{place}: {name}: {error}") from None
    if not lines:
        raise UserError(f"{place}: {name} {file}: has no prompt")
    return lines


def _sizes(table: Table, place: str) -> list[tuple[int, int]]:
    """One, or several of a list of lists; `resolutions` precedes `resolution`."""
    name = "resolutions" if "resolutions" in table else "resolution"
    value = table.get(name, 512)
    if isinstance(value, list) and (name == "resolutions" or any(isinstance(item, list) for item in value)):
        if not value:
            raise UserError(f"{place}: {name}: is empty")
        if len(value) == 2 and not any(isinstance(item, list) for item in value):
            return [_size(value, f"{place}: {name}")]  # a pair is height and width here, too
        return [_size(item, f"{place}: {name}") for item in value]
    return [_size(value, f"{place}: {name}")]


# -- values


def _text(table: Table, name: str, place: str, *, default: str = "") -> str:
    value = table.get(name, default)
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} {value!r}: must be text in quotes")
    return value


def _texts(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where}: {value!r}: must be a list of texts")
    if not value:
        raise UserError(f"{where}: is empty")
    return value


def _number(table: Table, name: str, place: str) -> float:
    value = table.get(name, 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise UserError(f"{place}: {name} {value!r}: must be a number")
    return float(value)


def _flag(table: Table, name: str, place: str) -> bool:
    value = table.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{place}: {name} {value!r}: must be true or false")
    return value


def _size(value: object, where: str) -> tuple[int, int]:
    """(width, height) from a side or, as kohya has it, [height, width]."""
    sides: list[Any] = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
        raise UserError(f"{where} {value!r}: must be a number of pixels, or [height, width]")
    if wrong := [side for side in sides if not 1 <= side <= MAX_SIDE]:
        raise UserError(f"{where} {wrong[0]}: must be 1 … {MAX_SIDE} pixels")
    height, width = sides
    return width, height


def check_sizes(settings: Iterable[Setting], *, multiple_of: int) -> None:
    """UserError for a side that the model cannot have."""
    for setting in settings:
        for side in setting.size:
            if side % multiple_of:
                nearest = max(multiple_of, round(side / multiple_of) * multiple_of)
                raise UserError(
                    f"{setting.place}: resolution {side}: this model's sides are multiples of {multiple_of} pixels, "
                    f"such as {nearest}"
                )
