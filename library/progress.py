"""Progress bars, all alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from library import processes

T = TypeVar("T")


def progress(items: Iterable[T] | None = None, **settings: Any) -> Any:
    """A tqdm bar on stderr, of the first process; where that is no terminal, a line every ten seconds instead of
    redrawing one.

    `items` may be missing: then `update()` moves it. `settings` are tqdm's: desc, total, unit, disable, delay …
    """
    from tqdm import tqdm

    settings["disable"] = settings.get("disable") or not processes.is_first()
    slow = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(items, mininterval=slow, dynamic_ncols=True, **settings)


def bar(
    items: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it", disable: bool = False
) -> Iterator[T]:
    """Iterate with a bar that appears if this takes longer than two seconds."""
    yield from progress(items, desc=desc, total=total, unit=unit, disable=disable, delay=2)
