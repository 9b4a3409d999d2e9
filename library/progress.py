"""Progress bars, all alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def bar(
    items: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it", disable: bool = False
) -> Iterator[T]:
    """Iterate with a bar on stderr, if it takes longer than two seconds; where that is no terminal, a line every ten."""
    from tqdm import tqdm

    slow = 0.1 if sys.stderr.isatty() else 10.0
    yield from tqdm(
        items, desc=desc, total=total, unit=unit, disable=disable, mininterval=slow, delay=2, dynamic_ncols=True
    )
