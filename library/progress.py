"""Progress bars, all alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypedDict, TypeVar, overload

from library import processes

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Bar(Protocol[T_co]):
    """The part of `tqdm.tqdm` that is used here; tqdm has no types."""

    n: float

    def __iter__(self) -> Iterator[T_co]: ...
    def __enter__(self) -> Bar[T_co]: ...
    def __exit__(self, *error: object) -> None: ...
    def update(self, n: float = 1) -> object: ...
    def refresh(self) -> object: ...
    def set_postfix(self, *, refresh: bool, **shown: str) -> None: ...
    def close(self) -> None: ...


class Settings(TypedDict, total=False):
    """tqdm's settings that are used here, named as there."""

    desc: str
    total: int | None
    initial: int
    unit: str
    disable: bool
    delay: float


@overload
def progress(items: None = None, **settings: Unpack[Settings]) -> Bar[None]: ...
@overload
def progress(items: Iterable[T], **settings: Unpack[Settings]) -> Bar[T]: ...
def progress(items: Iterable[T] | None = None, **settings: Unpack[Settings]) -> Bar[T] | Bar[None]:
    """A tqdm bar on stderr, shown by the first process. If stderr is no terminal, it prints a line every ten seconds.

    Without `items`, `update()` advances it.
    """
    from tqdm import tqdm

    settings["disable"] = settings.get("disable") or not processes.is_first()
    slow = 0.1 if sys.stderr.isatty() else 10.0
    bar: Bar[T] = tqdm(items, mininterval=slow, dynamic_ncols=True, **settings)
    return bar


def bar(
    items: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it", disable: bool = False
) -> Iterator[T]:
    """Iterate with a bar that appears if this takes longer than two seconds."""
    yield from progress(items, desc=desc, total=total, unit=unit, disable=disable, delay=2)
