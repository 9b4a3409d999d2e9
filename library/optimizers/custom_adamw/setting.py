"""A setting of a technique: its declaration as a field, and its allowed values."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Literal, TypeVar, get_args, get_origin

from library.errors import UserError, did_you_mean

T = TypeVar("T")

SMALLEST = 1e-30  # "above 0" means at least this much: float32 still holds it


@dataclass(frozen=True)
class Setting:
    """An option: a field of a technique. For the bounds and `of_group` see `setting`."""

    name: str
    hint: object  # its type: a class, a union or a `Literal`
    default: object
    help: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    of_group: bool = False

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """The values of a `Literal`."""
        return get_args(self.hint) if get_origin(self.hint) is Literal else ()

    @property
    def annotation(self) -> str:
        """Its type as text."""
        return inspect.formatannotation(self.hint).replace("typing.", "")

    @property
    def shown(self) -> str:
        """The default as text for users."""
        return ("on" if self.default else "off") if isinstance(self.default, bool) else str(self.default)

    def check(self, value: object) -> None:
        """Raise `UserError` for a value out of range; only switches, numbers and choices are checked."""
        if value is None and NoneType in self._kinds:
            return
        if self.hint is bool:
            fits, wanted = isinstance(value, bool), "True or False"
        elif self._kinds & {int, float}:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits, wanted = number and self._holds(value), f"a number{self._range}"  # type: ignore[arg-type]
        elif self.choices:
            fits, wanted = value in self.choices, f"one of {', '.join(self.choices)}"
        else:
            return
        if not fits:
            wanted += did_you_mean(str(value), self.choices)
            raise UserError(f"CustomAdamW: {self.name} = {value!r}; it must be {wanted}")

    @cached_property
    def _kinds(self) -> set[object]:
        return {*get_args(self.hint), self.hint}

    def _holds(self, value: float) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value - self.above >= SMALLEST)
            and (self.below is None or value < self.below)
            and not math.isnan(value)
        )

    @cached_property
    def _range(self) -> str:
        """The bounds in words, after a comma."""
        if self.minimum is not None and self.maximum is not None:
            return f", between {self.minimum:g} and {self.maximum:g}"
        if self.minimum is not None:
            return (
                f", {self.minimum:g} or more"
                if self.below is None
                else f", from {self.minimum:g} to below {self.below:g}"
            )
        parts = {"above": self.above, "at most": self.maximum, "below": self.below}
        return "".join(f", {word} {bound:g}" for word, bound in parts.items() if bound is not None)


def setting(
    default: T,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    of_group: bool = False,
) -> T:
    """Declare a setting as a field: bool, a number, a `Literal` of texts; another type is for `Technique.check`.

    `help`: a short description. `minimum`, `maximum`: inclusive bounds; `above`, `below`: exclusive ones. `of_group`: a
    fact about a parameter group, which is set in the group and not by the constructor.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"setting": {"help": help, **bounds, "of_group": of_group}})
