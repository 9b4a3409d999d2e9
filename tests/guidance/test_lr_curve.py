"""What a rate finder's curve says: both rules on curves whose answers are known, and what is refused."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.errors import UserError
from library.guidance import lr_curve
from library.guidance.find_lr import geometric
from library.guidance.lr_curve import Sweep

RATES = geometric(1e-7, 10, 100)


def curve(rates: list[float], *, steepest: float, breaks: float) -> list[float]:
    """A loss that falls by 0.2 along a logistic curve about `steepest`, and rises with the square of the rate."""
    fall = [1 / (1 + (steepest / rate) ** 2) for rate in rates]
    return [1 - 0.2 * down + (rate / breaks) ** 2 for rate, down in zip(rates, fall, strict=True)]


@given(steepest=st.floats(1e-5, 1e-2), times=st.floats(20, 1000))
def test_the_rules_find_what_the_curve_was_made_of(steepest: float, times: float) -> None:
    losses = curve(RATES, steepest=steepest, breaks=steepest * times)
    found = lr_curve.suggest(Sweep(RATES, losses, 1.0, False))
    # the rise shifts the steepest place down a little; a grid step is a fifth
    assert steepest / 2 < found.steepest < steepest * 1.5
    exact = min(range(len(RATES)), key=losses.__getitem__)
    assert abs(math.log10(found.lowest_at / RATES[exact])) < lr_curve.SMOOTHING
    assert found.tenth == found.lowest_at / 10
    assert found.turned
    assert float(f"{found.rate:.1e}") == found.rate


@given(st.floats(-0.5, 0.5), st.integers(20, 300))
def test_the_slope_of_a_straight_line_is_its_own(slope: float, count: int) -> None:
    rates = geometric(1e-6, 1, count)
    losses = [1 + slope * math.log10(rate) for rate in rates]
    assert lr_curve.smoothed(rates, losses) == pytest.approx(losses)
    assert lr_curve.slopes(rates, losses) == pytest.approx([slope] * count)


def test_a_dent_of_one_point_moves_nothing() -> None:
    losses = curve(RATES, steepest=1e-3, breaks=1)
    dented = [loss - 0.01 * (i == 62) for i, loss in enumerate(losses)]
    whole, other = (lr_curve.suggest(Sweep(RATES, values, 1.0, False)) for values in (losses, dented))
    assert RATES[62] > 5 * whole.steepest
    assert other.steepest == whole.steepest


def test_it_says_whether_the_curve_had_turned() -> None:
    falling = [1 - 0.1 * i / 99 for i in range(100)]
    assert not lr_curve.suggest(Sweep(RATES, falling, 1.0, False)).turned
    assert lr_curve.suggest(Sweep(RATES, falling, 1.0, True)).turned


def test_curves_that_say_nothing() -> None:
    with pytest.raises(UserError, match="the loss diverged at rate 4 of those tried: begin lower, with a smaller"):
        lr_curve.suggest(Sweep(RATES[:3], [1.0, 2.0, 9.0], 1.0, True))
    rising = [1 + i / 100 for i in range(100)]
    with pytest.raises(
        UserError, match=r"does not fall below 1, where it begins, at any rate from 1\.0e-07 to 1\.0e\+01"
    ):
        lr_curve.suggest(Sweep(RATES, rising, 1.0, False))


def test_rates_are_geometric() -> None:
    assert geometric(1e-4, 1e-2, 3) == pytest.approx([1e-4, 1e-3, 1e-2])
    assert (len(RATES), RATES[0], RATES[-1]) == (100, 1e-7, pytest.approx(10))


def test_files(tmp_path: Path) -> None:
    sweep = Sweep(RATES, curve(RATES, steepest=1e-3, breaks=0.1), 1.0, False)
    lr_curve.write_numbers(tmp_path / "n.csv", sweep)
    lr_curve.draw(tmp_path / "p.png", sweep, lr_curve.suggest(sweep), label="the UNet")
    with (tmp_path / "n.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100
    assert float(rows[40]["rate"]) == pytest.approx(RATES[40], rel=1e-5)
    assert float(rows[40]["loss"]) == pytest.approx(sweep.losses[40], rel=1e-5)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
