"""A weight decay that follows the gradient norm and the rate: closed forms, both kinds of optimizer, and a resume."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from library.config.parser import parse
from library.optimizers.create import choose_optimizer, create_optimizer
from library.optimizers.weight_decay import Curve
from library.optimizers.weight_decay_choice import apply, attach, check_options, decide
from library.optimizers.weight_decay_pace import FASTEST, KEEP, SLOWEST, STEADY, Pace

ON = ("--dynamic_weight_decay", "--wd_transition_steps", "10", "--wd_max_progress", "inf")
OPTIMIZERS = ("AdamW", "CustomAdamW")


class Run:
    """Steps of one parameter, whose rate falls as a half cosine over 40 steps."""

    def __init__(self, name: str, *words: str) -> None:
        options = parse(["--pretrained_model_name_or_path", "base", "--output_dir", "out", *ON, *words]).weight_decay
        choice = choose_optimizer(name, ["use_cautious=False"] if name == "CustomAdamW" else [], weight_decay=0.5)
        check_options(options, choice, clips_gradients=True)
        self.decided = decide(options, choice, total_steps=40, images=20)
        assert self.decided is not None
        self.parameter = torch.nn.Parameter(torch.ones(4))
        self.optimizer = create_optimizer(
            apply(self.decided, options, choice), [{"params": [self.parameter]}], learning_rate=0.01
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.observe = attach(self.decided, self.optimizer)

    def step(self, norm: float = 1.0) -> None:
        """With a gradient of zeros nothing moves but by the weight decay: AdamW's update is 0."""
        if self.observe is not None:
            self.observe(1.0, norm)
        self.parameter.grad = torch.zeros(4)
        self.optimizer.step()
        self.schedule.step()


def rate(done: int) -> float:
    return (1 + math.cos(math.pi * done / 40)) / 2


def curve(step: float) -> float:
    return max(0.1, 0.7 ** max(0, (step - 10) / 10))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("coupling", ["product", "lower"])
def test_the_weights_shrink_by_the_product_or_the_lower(name: str, coupling: str) -> None:
    run = Run(name, "--wd_lr_coupling", coupling)
    wanted = 1.0
    for step in range(1, 41):
        run.step()
        own, of_rate = curve(step), rate(step - 1)
        wanted *= 1 - 0.01 * 0.5 * (own * of_rate if coupling == "product" else min(own, of_rate))
    assert run.parameter[0].item() == pytest.approx(wanted, rel=1e-5)


def test_a_rate_of_nothing_does_not_divide_by_it() -> None:
    pace = Pace(with_rate=True)
    for group in ({"lr": 0.0, "initial_lr": 0.1}, {"lr": 0.0, "initial_lr": 0.0}, {"lr": 0.1}):
        assert 0 < pace.factor(group, Curve(transition_steps=1, max_progress=math.inf), 5) <= 1


@pytest.mark.parametrize(("norm", "speed"), [(1.0, 1.0), (0.8, 1.25), (0.01, FASTEST), (1.25, 0.8), (100.0, SLOWEST)])
def test_the_curve_goes_on_faster_with_smaller_gradients(norm: float, speed: float) -> None:
    """Once the mean is that of the new norms."""
    pace, group = Pace(by_gradient=True), {"lr": 1.0, "steps": 0}
    steps = Curve(transition_steps=10, max_progress=math.inf)
    for done in range(10):
        group["steps"] = done
        pace.observe([group], steps, 1.0, counter="steps")
    assert "wd_ahead" not in group
    group["wd_norm"] = norm
    for done in range(10, 15):
        group["steps"] = done
        pace.observe([group], steps, norm, counter="steps")
    assert group["wd_ahead"] == pytest.approx(5 * (speed - 1))
    assert pace.factor(group, steps, 15) == pytest.approx(curve(10 + 5 * speed))


def test_the_mean_is_a_running_one() -> None:
    pace, group = Pace(by_gradient=True), {"lr": 1.0, "steps": 0}
    for norm in (1.0, 2.0, 4.0):
        pace.observe([group], Curve(), norm, counter="steps")
    assert group["wd_norm"] == group["wd_usual_norm"] == pytest.approx(KEEP**2 + (1 - KEEP) * (2 * KEEP + 4))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steady_is_what_it_was(name: str) -> None:
    plain, steady = Run(name), Run(name, "--wd_speed", "steady", "--wd_lr_coupling", "product")
    equal = Run(name, "--wd_speed", "gradient")
    assert plain.decided.pace == steady.decided.pace == STEADY
    assert not STEADY
    for _ in range(30):
        for run in (plain, steady, equal):
            run.step()
    assert torch.equal(plain.parameter, steady.parameter)
    assert torch.allclose(plain.parameter, equal.parameter, rtol=1e-6)  # norms that stay the same
    assert not {"wd_norm", "wd_ahead", "wd_factor"} & plain.optimizer.param_groups[0].keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["exponential", "adaptive"])
def test_it_goes_on_from_a_state(name: str, schedule: str) -> None:
    words = ("--wd_speed", "gradient", "--wd_lr_coupling", "lower", "--wd_schedule", schedule)
    words += ("--wd_flat", "window=3", "earliest=5") if schedule == "adaptive" else ()
    whole, second = Run(name, *words), Run(name, *words)
    norms = [1 + 0.3 * math.sin(step) for step in range(40)]
    states: Any = None
    for step, norm in enumerate(norms):
        whole.step(norm)
        if step == 19:
            states = copy.deepcopy((whole.optimizer.state_dict(), whole.schedule.state_dict(), whole.parameter.data))
    second.optimizer.load_state_dict(states[0])
    second.schedule.load_state_dict(states[1])
    second.parameter.data.copy_(states[2])
    for norm in norms[20:]:
        second.step(norm)
    assert torch.equal(whole.parameter, second.parameter)
    assert whole.optimizer.param_groups[0]["wd_ahead"] == second.optimizer.param_groups[0]["wd_ahead"] != 0
