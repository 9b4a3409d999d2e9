"""When a loss counts as flat."""

from __future__ import annotations

import random
import statistics

import pytest

from library.errors import UserError
from library.optimizers.plateau import NOTHING, Plateau, trend


def flat_at(plateau: Plateau, losses: list[float], **signals: list[float]) -> int | None:
    """The number of steps after which the losses were found flat."""
    seen = NOTHING
    for step, loss in enumerate(losses):
        seen = plateau.observe(seen, step=step, loss=loss, **{name: values[step] for name, values in signals.items()})
        if seen["flat"]:
            return step
    return None


def noisy(slope: float, count: int, *, deviation: float = 0.1, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [1.0 + slope * i + draw.gauss(0, deviation) for i in range(count)]


def test_trend_is_least_squares() -> None:
    values = noisy(-0.01, 100)
    slope, intercept = statistics.linear_regression(range(100), values)
    found = trend(values)
    assert found.slope == pytest.approx(slope)
    left = [value - intercept - slope * i for i, value in enumerate(values)]
    assert found.variance == pytest.approx(sum(x * x for x in left) / 98)
    assert found.error == pytest.approx((found.variance / (100 * 9999 / 12)) ** 0.5)


def test_never_before_step_500_and_at_once_then() -> None:
    assert flat_at(Plateau(), [0.5] * 600) == 500
    assert flat_at(Plateau(earliest=0, window=10), [0.5] * 600) == 9


@pytest.mark.parametrize(("slope", "flat"), [(0.0009, True), (-0.0009, True), (0.0011, False), (-0.0011, False)])
def test_the_threshold_is_a_thousandth_a_step(slope: float, flat: bool) -> None:
    assert (flat_at(Plateau(), [5 + slope * step for step in range(700)]) is not None) == flat


def test_it_waits_until_the_last_hundred_steps_are_flat() -> None:
    losses = [2.0 - 0.002 * min(step, 700) for step in range(1000)]
    at = flat_at(Plateau(), losses)
    assert at is not None
    assert 700 < at < 800


def test_noise_neither_fakes_nor_hides_a_plateau() -> None:
    """The rule of two single losses would call a loss that falls by 0.002 a step flat in a third of the windows."""
    for seed in range(20):
        falling = noisy(-0.002, 600, seed=seed)
        assert flat_at(Plateau(), falling) is None
        found = flat_at(Plateau(), noisy(0.0, 700, seed=seed))
        assert found is not None
        literal = [abs(falling[i + 99] - falling[i]) / 100 < 0.001 for i in range(500)]
        assert sum(literal) > 50


def test_a_loss_too_noisy_to_tell_is_not_flat() -> None:
    assert flat_at(Plateau(), noisy(0.0, 1000, deviation=1.0)) is None


def test_variance() -> None:
    losses = noisy(0.0, 700, deviation=0.1)
    assert flat_at(Plateau(variance=0.02), losses) is not None
    assert flat_at(Plateau(variance=0.002), losses) is None


def test_gradient_norm() -> None:
    losses = [1.0] * 700
    assert flat_at(Plateau(gradient=0.001), losses, gradient_norm=[1.0] * 700) == 500
    assert flat_at(Plateau(gradient=0.001), losses, gradient_norm=[1 + 0.01 * i for i in range(700)]) is None
    assert flat_at(Plateau(gradient=0.001), losses) is None  # nobody tells it


def test_validation_loss() -> None:
    seen = NOTHING
    plateau = Plateau(earliest=0, window=3, validation=0.01)
    verdicts = []
    for value in (1.0, 0.9, 0.8, 0.7, 0.695):
        seen = plateau.observe(seen, step=9, loss=1.0, validation_loss=value)
        verdicts.append(seen["flat"])
    assert verdicts == [False, False, False, False, True]


def test_values_that_are_not_finite_are_passed_over() -> None:
    losses = [0.5] * 600
    losses[450] = float("nan")
    assert flat_at(Plateau(), losses) == 500


def test_what_was_handed_out_is_not_changed_later() -> None:
    plateau, seen = Plateau(), NOTHING
    first = plateau.observe(seen, step=0, loss=1.0)
    plateau.observe(first, step=1, loss=2.0)
    assert first["losses"] == (1.0,)
    assert NOTHING["losses"] == ()


@pytest.mark.parametrize("wrong", [{"window": 2}, {"slope": 0.0}, {"variance": 0.0}, {"gradient": -1.0}])
def test_mistakes(wrong: dict) -> None:
    with pytest.raises(UserError, match=f"wd_flat: {next(iter(wrong))}="):
        Plateau(**wrong)
