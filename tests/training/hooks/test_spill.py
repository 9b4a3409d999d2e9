"""A GPU that spills into the computer's memory is warned of once, and nothing else is."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from library.training.hook import Step
from library.training.hooks.spill import Spill

NO_RUN: Any = None


def warnings_of(
    steps: Iterable[tuple[float, tuple[int, int], int]], caplog: pytest.LogCaptureFixture, *, between: float = 0.0
) -> list[str]:
    """The warnings for steps of (seconds, size, images), with so much time between them."""
    now = 0.0
    hook = Spill(clock=lambda: now)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for number, (seconds, size, images) in enumerate(steps, 1):
            now += between
            batch: Any = SimpleNamespace(target_size=size, samples=[None] * images)
            hook.before_batch(NO_RUN, batch)
            now += seconds
            hook.after_step(NO_RUN, Step(number, 0))
    return [record.getMessage() for record in caplog.records]


def usual(seconds: float, count: int, size: tuple[int, int] = (512, 512), images: int = 2) -> list[Any]:
    return [(seconds, size, images)] * count


def test_slow_steps_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    found = warnings_of([*usual(1, 10), *usual(6, 20)], caplog)
    assert len(found) == 1
    assert found[0].startswith("step 13: three steps in a row took more than 5 times as long as earlier ones")
    assert "(6.0 s, before 1.0 s)" in found[0]


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([*usual(1, 10), *usual(4.9, 20)], id="less than five times"),
        pytest.param([*usual(1, 10), *usual(60, 2), *usual(1, 10), *usual(60, 2)], id="single ones"),
        pytest.param([*usual(1, 10), *usual(9, 20, size=(1024, 1024))], id="larger images"),
        pytest.param([*usual(1, 10), *usual(9, 20, images=16)], id="a larger batch"),
        pytest.param([*usual(20, 2), *usual(1, 10)], id="slow first steps"),
        pytest.param([*usual(1, 2), *usual(9, 20)], id="too few to compare with"),
    ],
)
def test_other_slow_steps_are_not(steps: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(steps, caplog) == []


def test_time_between_steps_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    """Samples and validation are rendered then."""
    assert warnings_of(usual(1, 30), caplog, between=100) == []
