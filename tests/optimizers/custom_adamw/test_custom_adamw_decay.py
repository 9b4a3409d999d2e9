"""CustomAdamW with each weight-decay curve: what is in effect, exact resumes, the state of the adaptive one."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
import torch
from adamw_problems import OFF, LoraRegression, bag, flat, gradients

from library.optimizers import CustomAdamW
from library.optimizers.weight_decay import SCHEDULES, Curve

STAGES = ((0, 1.0), (3, 0.5), (6, 0.2))
FLAT = {"window": 3, "earliest": 4}


def settings(schedule: str, **more: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"wd_schedule": schedule, "wd_transition_steps": 2, "wd_flat": FLAT, "weight_decay": 0.5}
    own |= {"wd_stages": STAGES, "wd_interpolate": True} if schedule == "multi_stage" else {}
    return {**OFF, "dynamic_weight_decay": True, "lr": 1e-2, **own, **more}


def curve(schedule: str) -> Curve:
    stages = STAGES if schedule == "multi_stage" else ()
    return Curve(schedule, transition_steps=2, stages=stages, interpolate=True)


def train(named: Any, optimizer: CustomAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        gradients(named, step)
        optimizer.observe(1.0)
        optimizer.step()


@pytest.mark.parametrize("implementation", ["auto", "eager"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_curve_is_in_effect(schedule: str, implementation: Any) -> None:
    """The same weights as those of a constant weight decay that somebody sets by hand before each step."""
    ours, by_hand = bag(), bag()
    optimizer = CustomAdamW(ours, **settings(schedule, implementation=implementation))
    other = CustomAdamW(by_hand, **{**OFF, "lr": 1e-2, "implementation": implementation})
    for step in range(9):
        train(ours, optimizer, step, step + 1)
        factor = curve(schedule).factor(step + 1, flat_since=4 if step >= 4 else None)
        other.param_groups[0]["weight_decay"] = 0.5 * factor
        train(by_hand, other, step, step + 1)
        assert optimizer.get_optimization_info()["weight_decay"] == [0.5 * factor]
    assert torch.equal(flat(ours), flat(by_hand))
    assert curve(schedule).factor(9, flat_since=4) < 0.7


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cut", [2, 6])
def test_a_resume_continues_bit_for_bit(schedule: str, cut: int) -> None:
    straight, interrupted = bag(), bag()
    train(straight, CustomAdamW(straight, **settings(schedule)), 0, 10)
    before = CustomAdamW(interrupted, **settings(schedule))
    train(interrupted, before, 0, cut)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    # the settings come from the state dict: a constructor without them
    after = CustomAdamW(interrupted, **OFF, wd_flat=FLAT)
    after.load_state_dict(torch.load(file, weights_only=True))
    train(interrupted, after, cut, 10)
    assert torch.equal(flat(interrupted), flat(straight))


def test_adaptive_waits_for_the_loss() -> None:
    named = bag()
    optimizer = CustomAdamW(named, **settings("adaptive"))
    for step in range(12):
        gradients(named, step)
        optimizer.observe(10.0 - min(step, 7))  # flat from step 7 on
        optimizer.step()
    assert optimizer.param_groups[0]["wd_flat_since"] == 9


def test_groups_may_have_curves_of_their_own() -> None:
    named = bag()
    groups = [{"params": named[:4], "wd_schedule": "adaptive"}, {"params": named[4:]}]
    optimizer = CustomAdamW(groups, **settings("linear"))
    train(named, optimizer, 0, 7)
    assert optimizer.get_optimization_info()["weight_decay"] == [
        0.5 * curve("adaptive").factor(7, flat_since=4),
        0.5 * curve("linear").factor(7),
    ]
    assert "wd_seen" not in optimizer.param_groups[1]


def test_a_step_with_a_closure_observes_by_itself() -> None:
    problem = LoraRegression()
    optimizer = CustomAdamW(problem.named, **settings("adaptive"))
    assert optimizer.step(lambda: problem.loss().detach()) > 0
    assert len(optimizer.param_groups[0]["wd_seen"]["losses"]) == 1
    assert optimizer.step(lambda: None) is None


def test_losses_that_nobody_tells_are_asked_for_once(caplog: pytest.LogCaptureFixture) -> None:
    problem = LoraRegression()
    with caplog.at_level(logging.WARNING):
        problem.train(CustomAdamW(problem.named, **settings("adaptive")), 9)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["CustomAdamW: wd_schedule='adaptive' needs the losses: call optimizer.observe(loss)"]


def test_a_state_dict_in_memory_does_not_change_with_training() -> None:
    named = bag()
    optimizer = CustomAdamW(named, **settings("adaptive"))
    train(named, optimizer, 0, 2)
    kept = optimizer.state_dict()
    train(named, optimizer, 2, 8)
    assert kept["param_groups"][0]["wd_seen"]["losses"] == (1.0, 1.0)
    assert kept["param_groups"][0]["wd_flat_since"] is None


def test_a_state_dict_of_an_earlier_version_has_the_exponential(caplog: pytest.LogCaptureFixture) -> None:
    named = bag()
    old = CustomAdamW(named, **settings("exponential")).state_dict()
    for name in ("wd_schedule", "wd_stages", "wd_interpolate", "wd_flat_since"):
        del old["param_groups"][0][name]
    optimizer = CustomAdamW(named, **settings("exponential"))
    optimizer.load_state_dict(old)
    train(named, optimizer, 0, 4)
    assert optimizer.get_optimization_info()["weight_decay"] == [pytest.approx(0.5 * 0.7)]
