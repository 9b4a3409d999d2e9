"""The keys of a data set's file: where each may stand, and its value in its type.

An implemented key is a field of the specs in `dataset_config.py`. Its type and bounds are those of the option of the
same name. The row in `kohya.py` decides which values of an unsupported key of kohya's have no effect and are accepted.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable

from library.config import kohya
from library.config.fields import (
    UNSET,
    BadValue,
    ControlCharacters,
    Unset,
    convert,
    read_balance,
    read_range,
    read_resolution,
    read_resolutions,
    read_share,
    read_skipped_resolution,
    refuse_control_characters,
)
from library.config.options import declared_options
from library.errors import did_you_mean

logger = logging.getLogger(__name__)

# Keys whose option has another name.
OPTION_NAMES = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}

# Known to kohya's data sets, not supported yet.
NOT_YET_SUBSET: tuple[str, ...] = ()
NOT_YET_DATASET = ("network_multiplier",)
NOT_YET_ANYWHERE = ("cache_info",)
NOT_YET = (*NOT_YET_SUBSET, *NOT_YET_DATASET, *NOT_YET_ANYWHERE)
# The values without effect of keys that are no option of kohya's.
NEUTRAL: dict[str, object] = {"network_multiplier": 1.0}
# Keys where "" switches off the value of an outer table or an option, with the value that "" means. Elsewhere "" has
# no effect.
EMPTY_IS_OFF: dict[str, object] = {
    "caption_prefix": None,
    "caption_suffix": None,
    "class_tokens": None,
    "keep_tokens_separator": "",
    "secondary_separator": None,
}
# The only key of custom_attributes that is read; kohya's trainer reads it, too.
PRESERVATION = "diff_output_preservation"

# Keys that are no options, in their types, and the values of those that are a choice.
_TYPES: dict[str, type] = {"is_reg": bool, "prior_weight": float}
_CHOICES = {"prior": ("base", "previous"), "prior_region": ("all", "outside_mask")}

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
}


def check_key(key: str, value: object, *, level: str, levels: dict[str, tuple[str, ...]], place: str) -> object:
    """The value of `key` in its type, or UNSET if it has no effect. Raises BadValue.

    `level` is the kind of table in which it stands, one of `levels`, which lists the keys of each.
    """
    if key not in levels[level]:
        elsewhere = [name for name, keys in levels.items() if key in keys]
        if elsewhere:
            raise BadValue(f"belongs to {' or '.join(elsewhere)}, not to {level}")
        raise BadValue(f"unknown key{did_you_mean(key, levels[level])}")
    if key in NOT_YET:
        _refuse_unless_neutral(key, value, place)
        return UNSET
    if value == "" and key in EMPTY_IS_OFF:
        return EMPTY_IS_OFF[key]
    if value in ("", []):
        return UNSET
    if key == "custom_attributes":
        return _attributes(value, place)
    if key in ("resolution", "skip_image_resolution"):
        return _resolution(value, read_resolution if key == "resolution" else read_skipped_resolution)
    if key == "resolutions":
        return _resolutions(value)
    if key in ("share", "reg_share"):
        return read_share(_shown(value))
    if key == "balance":
        return _balance(value)
    return _range(value) if key == "face_crop_aug_range" else _in_type(key, value)


def _refuse_unless_neutral(key: str, value: object, place: str) -> None:
    if key in NEUTRAL:
        if value not in ("", NEUTRAL[key]):
            raise BadValue("known to kohya's scripts, not supported here yet")
        return
    items = value if isinstance(value, list) else [value]
    words = tuple(str(item).lower() if isinstance(item, bool) else str(item) for item in items) or ("",)
    verdict = kohya.judge(key, words)
    if verdict.error:
        raise BadValue(verdict.error)
    if verdict.warning:
        logger.warning("%s: %s: %s", place, key, verdict.warning)


def _in_type(key: str, value: object) -> object:
    option = declared_options().get(OPTION_NAMES.get(key, key))
    kind: type = _TYPES.get(key) or (option.kind if option else str)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # not isinstance: true is an int in Python
        raise BadValue(f"{_shown(value)} is not {_KINDS[kind]}")
    if isinstance(value, str) and not (key == "class_tokens" or (option and option.details.free_text)):
        try:
            refuse_control_characters(value)
        except ControlCharacters as error:
            raise BadValue(f"{error}; {ControlCharacters.in_a_file}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise BadValue(f"{_shown(value)} is not a number")
    if key in _CHOICES and isinstance(value, str) and value not in _CHOICES[key]:
        raise BadValue(f"{_shown(value)} is not one of {', '.join(_CHOICES[key])}{did_you_mean(value, _CHOICES[key])}")
    if key == "prior_weight" and isinstance(value, float) and value < 0:
        raise BadValue(f"must be at least 0, not {value:g}")
    # 0 repeats is how kohya's users switch a subset off
    minimum = option.details.minimum if option and key != "num_repeats" else None
    maximum = option.details.maximum if option else None
    if minimum is not None and isinstance(value, int | float) and value < minimum:
        raise BadValue(f"must be at least {minimum:g}, not {value}")
    if maximum is not None and isinstance(value, int | float) and value > maximum:
        raise BadValue(f"must be at most {maximum:g}, not {value}")
    return convert(option, (value,)) if option and option.choices and isinstance(value, str) else value


def _attributes(value: object, place: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise BadValue(f"{_shown(value)} is not a table such as {{ name = 1 }}")
    if not isinstance(value.get(PRESERVATION, False), bool):
        raise BadValue(f"{PRESERVATION}: {_shown(value[PRESERVATION])} is not {_KINDS[bool]}")
    if idle := [name for name in value if name != PRESERVATION]:
        logger.warning("%s: custom_attributes: %s has no effect: nothing reads it", place, ", ".join(idle))
    return value


def _resolution(value: object, read: Callable[[str], tuple[int, int] | Unset]) -> tuple[int, int] | Unset:
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value):
        value = f"{value[0]},{value[1]}"
    if type(value) not in (int, str):
        raise BadValue(f"{_shown(value)} is neither a whole number of pixels nor [width, height]")
    return read(str(value))


def _resolutions(value: object) -> object:
    """Sizes in a list, each a number of pixels or [width, height]; or text such as "512,768x512"."""
    sizes = value if isinstance(value, list) else [value]
    words = ["x".join(map(str, size)) if isinstance(size, list) else str(size) for size in sizes]
    return read_resolutions(",".join(words))


def _balance(value: object) -> str:
    if isinstance(value, list) and all(type(weight) in (int, float) for weight in value):
        value = ",".join(map(str, value))
    if not isinstance(value, str):
        raise BadValue(f"{_shown(value)} is neither 'smallest' nor 'equal', nor a list of weights such as [2, 1, 1]")
    return read_balance(value)


def _range(value: object) -> tuple[float, float]:
    if isinstance(value, list) and all(type(end) in (int, float) for end in value):
        return read_range(",".join(map(str, value)))
    return read_range(str(value))


def _shown(value: object) -> str:
    """The value as TOML and JSON write it."""
    return json.dumps(value, ensure_ascii=False, default=str)
