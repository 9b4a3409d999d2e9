"""The knee of held-out losses by rank."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from library.evaluation.rank_curve import Trained, advice, alpha_of, knee, plot, points


def runs(losses: dict[int, list[float]], *, base: float = 0.10) -> list[Trained]:
    return [
        Trained(rank, float(rank), seed, base, loss, 10, 1000 * rank, 1.0)
        for rank, own in losses.items()
        for seed, loss in enumerate(own)
    ]


def test_one_seed_by_the_share_of_the_gain() -> None:
    """The best gains 0.02: 5 % of that are 0.001."""
    found = points(runs({4: [0.0850], 8: [0.0811], 16: [0.0809], 32: [0.0800], 64: [0.0805]}))
    assert [point.rank for point in found] == [4, 8, 16, 32, 64]
    assert found[1].behind == pytest.approx(0.0011)
    assert math.isnan(found[1].error)
    assert found[3].gain == pytest.approx(20)
    assert knee(found, within=5).rank == 16
    assert knee(found, within=10).rank == 8
    assert knee(found, within=0).rank == 32


def test_several_seeds_by_one_standard_error_of_the_paired_difference() -> None:
    """Seeds differ by ten times more than ranks; the differences within a seed decide."""
    found = points(runs({4: [0.0712, 0.0810, 0.0908], 8: [0.0702, 0.0799, 0.0902], 16: [0.0700, 0.0800, 0.0900]}))
    assert [point.behind for point in found] == pytest.approx([0.0010, 0.0001, 0.0])
    # the differences of rank 8 are 2, -1 and 2 times 1e-4: standard deviation 1.732e-4, over the root of 3
    assert found[1].error == pytest.approx(1e-4)
    assert knee(found, within=0).rank == 8


def test_only_common_seeds_count() -> None:
    found = points(runs({4: [0.080, 0.010], 8: [0.079]}))
    assert [len(point.runs) for point in found] == [1, 1]
    assert knee(found, within=0).rank == 8


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({4: [0.11], 8: [0.12]}, "no rank is better than the base"),
        ({4: [0.080], 8: [0.080]}, "a still lower one"),
        ({4: [0.09], 8: [0.08]}, "a still higher one"),
        ({4: [0.09], 8: [0.08], 16: [0.08]}, ""),
    ],
)
def test_advice(losses: dict[int, list[float]], said: str) -> None:
    found = points(runs(losses))
    given = advice(found, knee(found, within=5))
    assert said in given
    assert bool(said) == bool(given)


def test_every_rule_of_alpha_keeps_the_users_own() -> None:
    for rule in ("ratio", "sqrt", "fixed"):
        assert alpha_of(rule, 16, own_rank=16, own_alpha=8) == 8
    assert alpha_of("ratio", 64, own_rank=16, own_alpha=8) == 32
    assert alpha_of("sqrt", 64, own_rank=16, own_alpha=8) == 16
    assert alpha_of("fixed", 64, own_rank=16, own_alpha=8) == 8


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    found = points(runs({4: [0.0712, 0.0810], 8: [0.0702, 0.0799]}))
    plot(tmp_path / "plot.png", found, found[1])
    assert (tmp_path / "plot.png").stat().st_size > 5000
