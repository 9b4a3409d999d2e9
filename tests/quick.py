"""Which parameters of a test run in `make test`, and which in `make test-full` alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """All of these for `parametrize`: the chosen in `make test`, the others, which take seconds each, beside them in
    `make test-full`."""
    values = list(values)
    assert all(one in values for one in chosen), (chosen, values)
    return [value if value in chosen else slow(value) for value in values]


def slow(value: Any) -> Any:
    """A parameter for `make test-full`."""
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
