"""The sign that a network may be full: on made curves that show it and on curves that do not."""

from __future__ import annotations

import math
import random

import pytest

from library.training.capacity import Epoch, Epochs, is_full
from library.training.warning_signs import Watch

STEPS = 500  # of an epoch
MEASURED = {"update_ratio": 2e-3, "moved": {"unet": 1.0}, "loss_by_timestep": [0.1] * 5}  # a healthy step
STILL = [(float(STEPS * epoch), 0.110 - 0.0002 * epoch) for epoch in range(1, 7)]  # the validation loss


def epochs(*means: float, error: float = 0.0) -> list[Epoch]:
    return [Epoch(mean, error, STEPS * (place + 1)) for place, mean in enumerate(means)]


def test_the_curve_of_the_rule_s_usual_example() -> None:
    """2.35, 2.31, 2.29, 2.28: 1.7, 0.9 and 0.4 % an epoch."""
    assert is_full(epochs(2.35, 2.31, 2.29, 2.28), STILL)


@pytest.mark.parametrize(
    "means",
    [
        (2.35, 2.25, 2.16, 2.07),  # 4 % an epoch
        (2.35, 2.31, 2.29),  # three epochs
        (2.28, 2.36, 2.44, 2.52),  # it rises
    ],
    ids=["still learns", "too early", "rises"],
)
def test_training_that_is_not_full(means: tuple[float, ...]) -> None:
    assert not is_full(epochs(*means), STILL)


def test_a_loss_that_is_too_noisy_says_nothing() -> None:
    assert is_full(epochs(2.3, 2.3, 2.3, 2.3, error=0.05), STILL)  # an error of 1 % in the slope
    assert not is_full(epochs(2.3, 2.3, 2.3, 2.3, error=0.12), STILL)


@pytest.mark.parametrize(
    "losses",
    [
        (0.110, 0.108, 0.106, 0.104),  # the validation loss still falls
        (0.110, 0.110, 0.112, 0.115),  # it rises
        (0.110, 0.110),  # too few
    ],
    ids=["generalises", "overfits", "too few"],
)
def test_what_held_out_images_exclude(losses: tuple[float, ...]) -> None:
    validation = [(float(STEPS * (place + 1)), loss) for place, loss in enumerate(losses)]
    assert not is_full(epochs(2.35, 2.31, 2.29, 2.28), validation)
    assert not is_full(epochs(2.35, 2.31, 2.29, 2.28), [])


def test_the_means_of_epochs() -> None:
    found, draw = Epochs(), random.Random(0)
    losses = [[draw.random() for _ in range(10)] for _ in range(7)]
    step = 0
    for epoch, values in enumerate(losses, 1):
        for value in values:
            step += 1
            found.add(step, epoch=epoch, loss=value)
        found.add(step, epoch=epoch, loss=math.nan)  # a skipped step
    whole = found.whole()
    assert [epoch.last_step for epoch in whole] == [30, 40, 50, 60, 70]
    mean = sum(losses[-1]) / 10
    assert whole[-1].mean == pytest.approx(mean)
    assert whole[-1].error == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in losses[-1]) / 9 / 10))
    found.add(71, epoch=8, loss=0.5)  # an epoch that has only begun
    assert found.whole()[-1].last_step == 70


def run(watch: Watch, *, level: float, fall: float, epochs: int = 8, seed: int = 0, rate: float = 1e-4) -> list[str]:
    """The signs of a run whose losses are a diffusion model's: noise as large as the loss itself."""
    draw, found = random.Random(seed), []
    for epoch in range(1, epochs + 1):
        for place in range(2000):
            step = (epoch - 1) * 2000 + place + 1
            loss = level * (1 - fall) ** (step / 2000) * draw.lognormvariate(-0.32, 0.8)
            watch.trained(step, epoch=epoch, loss=loss)
        measured = {
            "update_ratio": 2e-3,
            "rates": {"unet": rate},
            "moved": {"unet": 1.0},
            "loss_by_timestep": [0.1] * 5,
        }
        found += watch.measured(2000 * epoch, **measured)
        found += watch.validated(2000 * epoch, level * (1 - fall) ** epoch, [])
    return [sign.name for sign in found]


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_has_stopped_to_learn_is_told_once(seed: int) -> None:
    assert run(Watch(total_steps=16_000), level=0.12, fall=0.0, seed=seed) == ["capacity"]


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_learns_is_not(seed: int) -> None:
    assert run(Watch(total_steps=16_000), level=0.12, fall=0.05, seed=seed) == []


def test_at_the_end_of_a_schedule_standing_still_is_expected() -> None:
    watch = Watch(total_steps=16_000)
    watch.measured(1, rates={"unet": 1e-3}, **MEASURED)
    assert run(watch, level=0.12, fall=0.0) == []
