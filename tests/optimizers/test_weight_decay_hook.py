"""The curve on optimizers that know nothing of it."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
import torch

from library.errors import UserError
from library.optimizers.create import choose_optimizer, create_optimizer
from library.optimizers.plateau import Plateau
from library.optimizers.registry import OPTIMIZERS
from library.optimizers.weight_decay import Curve
from library.optimizers.weight_decay_hook import WeightDecayHook

CURVE = Curve("linear", transition_steps=2, min_ratio=0.0, max_progress=2.0)
FACTORS = [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def problem(name: str = "AdamW", *words: str, decay: float = 0.5) -> tuple[list[torch.nn.Parameter], Any]:
    """Two parameters (one large enough for 8 bits) in two groups, the second without weight decay."""
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=draw)) for size in ((80, 80), (7,))]
    choice = choose_optimizer(name, [f"weight_decay={decay}", *words])
    groups = [
        {"params": [parameters[0]], "lr": 0.1, "name": "a"},
        {"params": [parameters[1]], "lr": 0.1, "name": "b", "weight_decay": 0.0},
    ]
    return parameters, create_optimizer(choice, groups, learning_rate=0.1)


def step(parameters: list[torch.nn.Parameter], optimizer: Any, number: int) -> None:
    for index, parameter in enumerate(parameters):
        draw = torch.Generator().manual_seed(100 * number + index)
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    optimizer.step()


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "CustomAdamW"])
def test_every_optimizer_follows_the_curve(name: str) -> None:
    """Bit for bit as if somebody had set the number before each step; and the number matters."""
    words = ("relative_step=False", "scale_parameter=False") if name == "Adafactor" else ()
    words = ("d0=0.1",) if name.startswith("DAdapt") else words  # at their usual 1e-6 seven steps change no bit
    followed, by_hand, constant = (problem(name, *words) for _ in range(3))
    WeightDecayHook(followed[1], CURVE, Plateau())
    for parameters, optimizer in (followed, by_hand, constant):
        if hasattr(optimizer, "train"):
            optimizer.train()
        for number, factor in enumerate(FACTORS):
            if optimizer is by_hand[1]:
                optimizer.param_groups[0]["weight_decay"] = 0.5 * factor
            step(parameters, optimizer, number)
    assert all(torch.equal(a, b) for a, b in zip(followed[0], by_hand[0], strict=True))
    assert not torch.equal(followed[0][0], constant[0][0])
    assert torch.equal(followed[0][1], constant[0][1]) or "D" in name or name == "Prodigy"  # those share one d


def test_the_numbers_of_each_step() -> None:
    parameters, optimizer = problem()
    WeightDecayHook(optimizer, CURVE, Plateau())
    seen = []
    for number in range(len(FACTORS)):
        step(parameters, optimizer, number)
        seen.append([group["weight_decay"] for group in optimizer.param_groups])
    assert seen == [[0.5 * factor, 0.0] for factor in FACTORS]


def saved(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion", "Adafactor"])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_resume_continues_bit_for_bit(name: str, cut: int) -> None:
    """The adaptive curve, found flat after 4 steps: cut before, and cut after."""
    words = ("relative_step=False", "scale_parameter=False") if name == "Adafactor" else ()
    curve, plateau = Curve("adaptive", transition_steps=2), Plateau(window=3, earliest=4)

    def train(parameters: Any, optimizer: Any, first: int, last: int) -> None:
        hook = WeightDecayHook(optimizer, curve, plateau)
        for number in range(first, last):
            hook.observe(1.0)
            step(parameters, optimizer, number)

    straight, interrupted = problem(name, *words), problem(name, *words)
    train(*straight, 0, 8)
    train(*interrupted, 0, cut)
    state, resumed = saved(interrupted[1]), problem(name, *words)
    for mine, theirs in zip(resumed[0], interrupted[0], strict=True):
        mine.data.copy_(theirs.data)
    resumed[1].load_state_dict(state)
    train(*resumed, cut, 8)
    assert all(torch.equal(a, b) for a, b in zip(resumed[0], straight[0], strict=True))
    group = straight[1].param_groups[0]
    assert (group["wd_flat_since"], group["wd_step"]) == (4, 8)
    assert group["weight_decay"] == pytest.approx(0.5 * 0.49)


def test_steps_that_a_gradient_scaler_skips_are_not_counted() -> None:
    parameters, optimizer = problem()
    WeightDecayHook(optimizer, CURVE, Plateau())
    scaler = torch.amp.GradScaler("cpu")
    for value in (1.0, float("inf"), 1.0):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, value)
        scaler.scale(torch.zeros(()))  # makes the scale
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.param_groups[0]["wd_step"] == 2


def test_accelerate_keeps_the_curve() -> None:
    from accelerate import Accelerator

    parameters, optimizer = problem()
    WeightDecayHook(optimizer, CURVE, Plateau())
    prepared = Accelerator(cpu=True).prepare_optimizer(optimizer)
    for number in range(3):
        step(parameters, prepared, number)
    assert optimizer.param_groups[0]["weight_decay"] == 0.375


def test_what_vanishes_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    parameters, optimizer = problem(decay=1e-8)
    WeightDecayHook(optimizer, CURVE, Plateau())
    step(parameters, optimizer, 0)
    assert caplog.records == []  # 1e-8 itself is not below, and a weight decay of 0 was never there
    with caplog.at_level(logging.WARNING):
        for number in range(1, 7):
            step(parameters, optimizer, number)
    assert [record.getMessage() for record in caplog.records] == [
        "the weight decay has fallen below 1e-08: nothing is regularised any more"
    ]


def test_an_optimizer_without_weight_decay_is_refused() -> None:
    with pytest.raises(UserError, match="LBFGS has no weight_decay to change"):
        WeightDecayHook(torch.optim.LBFGS([torch.nn.Parameter(torch.zeros(1))]), CURVE, Plateau())
