"""Learning-rate curves at known steps."""

from __future__ import annotations

import math

import pytest
import torch

from library.errors import UserError
from library.optimizers.schedules import SCHEDULES, create_schedule, warmup_steps


def factors(name: str, *, total: int = 100, warmup: int = 0, num_cycles: int = 1, power: float = 1.0) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = create_schedule(name, optimizer, total_steps=total, warmup=warmup, num_cycles=num_cycles, power=power)
    values = []
    for _ in range(total):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_runs_and_stays_within_the_rate(name):
    assert all(0 <= value <= 1 for value in factors(name, warmup=0))


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "constant"])
def test_warmup_is_linear_from_zero(name):
    assert factors(name, warmup=10)[:11] == pytest.approx([i / 10 for i in range(11)], abs=1e-6)


def test_closed_forms():
    assert factors("constant") == [1.0] * 100
    assert factors("linear")[50] == pytest.approx(0.5)
    assert factors("cosine")[25] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    # two hard restarts: the second half starts again from the full rate
    restarts = factors("cosine_with_restarts", num_cycles=2)
    assert restarts[49] < 0.01
    assert restarts[50] == pytest.approx(1.0)
    # diffusers' polynomial ends at 1e-7
    assert factors("polynomial", power=2.0)[50] == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize(("value", "steps"), [(0, 0), (100, 100), ("100", 100), (0.05, 50), ("5%", 50), ("0.1", 100)])
def test_warmup_as_steps_ratio_or_percentage(value, steps):
    assert warmup_steps(value, 1000) == steps


@pytest.mark.parametrize("value", [1001, -1, "101%"])
def test_impossible_warmup_is_refused(value):
    with pytest.raises(UserError, match="lr_warmup_steps"):
        warmup_steps(value, 1000)


def test_constant_refuses_warmup():
    with pytest.raises(UserError, match="constant_with_warmup"):
        factors("constant", warmup=5)
