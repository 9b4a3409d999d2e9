"""The project's own learning-rate curves against torch's and the paper's formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from library.errors import UserError
from library.optimizers import rate_curves


def rates(make: Callable[..., Any], steps: int = 60, **arguments: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = make(optimizer, **arguments)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_exponential_is_torchs() -> None:
    assert rates(rate_curves.exponential, gamma=0.9) == pytest.approx(rates(ExponentialLR, gamma=0.9))


def test_step_is_torchs() -> None:
    assert rates(rate_curves.step, step_size=7, gamma=0.3) == pytest.approx(rates(StepLR, step_size=7, gamma=0.3))
    assert rates(rate_curves.step, step_size=7) == pytest.approx(rates(StepLR, step_size=7))


def test_rex_is_the_papers() -> None:
    found = rates(rate_curves.rex, 51, num_training_steps=50)
    for t in range(51):
        assert found[t] == pytest.approx(0.5 * (1 - t / 50) / (0.5 + 0.5 * (1 - t / 50)))
    assert found[25] == pytest.approx(0.5 * 2 / 3)
    assert found[50] == 0.0


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (rate_curves.exponential, {"gamma": 0.9}),
        (rate_curves.step, {"step_size": 7}),
        (rate_curves.rex, {"num_training_steps": 60}),
    ],
)
def test_after_a_warmup_they_are_the_same_from_its_end(make: Any, arguments: dict[str, Any]) -> None:
    warm = rates(make, num_warmup_steps=10, **arguments)
    assert warm[:10] == pytest.approx([0.5 * i / 10 for i in range(10)])
    shorter = arguments | ({"num_training_steps": 50} if "num_training_steps" in arguments else {})
    assert warm[10:] == pytest.approx(rates(make, **shorter)[:50])


def test_a_warmup_as_long_as_the_run() -> None:
    assert rates(rate_curves.rex, 10, num_training_steps=10, num_warmup_steps=10)[-1] == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (rate_curves.exponential, {"gamma": 1.1}, "gamma=1.1: it must be above 0, at most 1"),
        (rate_curves.step, {"step_size": 0}, "step_size=0: it must be 1 or more"),
        (rate_curves.step, {"step_size": 5, "gamma": 0.0}, "gamma=0: it must be"),
    ],
)
def test_mistakes(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rates(make, **arguments)
