"""Dataclasses as JSON, and back again."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_json(value: object) -> Any:
    """JSON values: objects for dataclasses, lists for tuples, None for floats that are not finite, text for paths and
    the like."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def from_json(kind: type[T], value: object, name: str = "") -> T:
    """A dataclass of `kind` from its JSON. Unknown keys are ignored: a later version may write more.

    Raises ValueError, which names the key, for a value that is missing or of another type.
    """
    return typing.cast(T, _read(kind, value, name or kind.__name__))


def _read(kind: Any, value: object, name: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind in (Any, object):
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        (kind,) = (item for item in inner if item is not type(None))  # X | None is the only union
        return _read(kind, value, name)
    if is_dataclass(kind):
        return _dataclass(kind, _checked(value, dict, name), name)
    if origin in (tuple, list):
        items = _checked(value, list, name)
        each = inner * len(items) if origin is list else inner[:1] * len(items) if inner[-1] is Ellipsis else inner
        if len(each) != len(items):
            raise ValueError(f"{name}: {len(items)} values, not {len(each)}")
        pairs = enumerate(zip(each, items, strict=True))
        return origin(_read(one, item, f"{name} {place}") for place, (one, item) in pairs)
    if origin is dict:
        return {key: _read(inner[1], item, f"{name} {key}") for key, item in _checked(value, dict, name).items()}
    if kind is float and type(value) is int:
        return float(value)
    return _checked(value, kind, name)


def _dataclass(kind: Any, table: dict[str, object], name: str) -> Any:
    hints, values = get_type_hints(kind), {}
    for field in fields(kind):
        if field.name in table:
            values[field.name] = _read(hints[field.name], table[field.name], f"{name} {field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{name}: {field.name} is missing")
    return kind(**values)


def _checked(value: object, kind: type, name: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{name}: {type(value).__name__} where {kind.__name__} is expected")
    return value
