"""Paired differences, their standard errors, and the sentence about overfitting."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from library.evaluation.differences import Difference, Result, difference, hint, mean, worst
from library.evaluation.plots import plot_differences


def test_a_constant_ratio_has_no_error() -> None:
    found = difference([0.9, 1.8, 2.7], [1.0, 2.0, 3.0])
    assert found.percent == pytest.approx(-10)
    assert found.error == pytest.approx(0, abs=1e-12)


def test_one_image_has_no_known_error() -> None:
    found = difference([0.9], [1.0])
    assert found.percent == pytest.approx(-10)
    assert math.isnan(found.error)
    assert not found.is_better
    assert not found.is_worse


def test_the_error_is_the_scatter_of_repeated_measurements() -> None:
    """Of 4000 folders of 40 images each. The scatter of 4000 numbers is known to 1.1 %; 5 % is 4.5 times that."""
    draws = np.random.default_rng(0)
    base = draws.gamma(4.0, 0.02, (4000, 40))
    own = base * (0.95 + 0.05 * draws.standard_normal(base.shape))
    found = [difference(a, b) for a, b in zip(own.tolist(), base.tolist(), strict=True)]
    scatter = np.std([one.percent for one in found])
    assert np.sqrt(np.mean([one.error**2 for one in found])) == pytest.approx(scatter, rel=0.05)


def test_folders_count_alike() -> None:
    found = mean([Difference(1.0, 2.0, -50.0, 3.0), Difference(3.0, 2.0, 50.0, 4.0)])
    assert found == Difference(2.0, 2.0, 0.0, 2.5)


def _result(folder: str, percent: float, *, trained: bool, error: float = 1.0) -> Result:
    return Result("fox", folder, trained, 8, Difference(1.0, 1.0, percent, error), ())


def test_overfitting_is_named_where_both_differences_are_sure() -> None:
    learnt, lost = _result("train", -9, trained=True), _result("other", 6, trained=False)
    said = hint([learnt, _result("near", 1, trained=False), lost])
    assert said is not None
    assert said.startswith("fox: overfitted: -9.0 % on train, which it was trained on, and +6.0 % on other")
    assert hint([learnt]) is None
    assert hint([lost]) is None
    assert hint([learnt, _result("other", 1.5, trained=False)]) is None
    assert hint([_result("train", -9, trained=True, error=5), lost]) is None
    assert worst([learnt, lost]) is lost


def test_the_mean_and_the_worst_are_of_images_that_were_not_trained_on() -> None:
    from library.evaluation.evaluate import table

    own = [_result("train", -50, trained=True), _result("a", 4, trained=False), _result("b", 2, trained=False)]
    line = list(table(own))[-1]
    assert line.split()[-5:] == ["+3.00", "±", "0.71", "%", "a"]
    assert "mean" not in list(table(own[:2]))[1]


def test_any_name_can_stand_in_the_plot(tmp_path: Path) -> None:
    """Matplotlib leaves labels that begin with "_" out, and "$_$" would be a formula."""
    one = Difference(1.0, 1.0, -5.0, 1.0)
    plot_differences(tmp_path / "plot.png", [Result("_fox $_$", "$_$", False, 8, one, ())], ())
    assert (tmp_path / "plot.png").is_file()
