"""The study's plan and statistics; the runs themselves take hours."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import optimizer_quality as study
from benchmarks import quality_report

ADAMW = study.Variant(study.ADAMW, "peer", "AdamW")


def rows_of(*rows: study.Row) -> dict[study.Key, study.Row]:
    return {study.key_of(row): row for row in rows}


def row(power: int, loss: float, *, seed: int = study.CHOOSING_SEED, optimizer: str = "AdamW") -> study.Row:
    return study.Row(optimizer, "", study.rate(power), seed, study.STEPS, loss, loss, 1.0)


def grid(*losses: float, optimizer: str = "AdamW") -> list[study.Row]:
    return [row(power, loss, optimizer=optimizer) for power, loss in zip(study.GRID, losses, strict=True)]


def test_the_grid_comes_first_and_seeds_after_it():
    assert study.missing(ADAMW, {}, 3) == [(study.rate(power), 0) for power in study.GRID]
    rows = rows_of(*grid(3, 1, 2, 4))
    assert study.best_power(ADAMW, rows) == 0
    assert study.missing(ADAMW, rows, 3) == [(study.MIDDLE, seed) for seed in (1, 2, 3)]
    rows |= rows_of(row(0, 1, seed=2))
    assert study.missing(ADAMW, rows, 3) == [(study.MIDDLE, 1), (study.MIDDLE, 3)]


@pytest.mark.parametrize(("losses", "power"), [((1, 2, 3, 4), -2), ((4, 3, 2, 1), 3), ((1, math.inf, 3, 4), -2)])
def test_the_grid_grows_while_its_best_rate_is_at_the_edge(losses, power):
    rows = rows_of(*grid(*losses))
    assert study.best_power(ADAMW, rows) is None
    assert study.missing(ADAMW, rows, 3) == [(study.rate(power), 0)]


def test_the_grid_ends_somewhere():
    rows = rows_of(*(row(power, -power) for power in range(study.GRID[0], study.MOST + 1)))
    assert study.best_power(ADAMW, rows) == study.MOST


def test_rows_survive_the_file(tmp_path: Path):
    path = tmp_path / "rows.csv"
    rows = [row(0, 0.1 + 0.2), study.Row("A", "b c:d=1", 1e-3, 7, study.STEPS, math.inf, math.nan, 2.5)]
    for each in rows:
        study.append(path, each)
    study.append(path, study.Row("A", "", 1e-3, 7, study.STEPS + 1, 0.1, 0.1, 2.5))  # of another length of training
    found = list(study.read_rows(path).values())
    assert found[0] == rows[0]
    assert math.isnan(found[1].report)
    assert found[1].validation == math.inf
    assert len(found) == 2


def test_rows_are_filed_under_what_is_on():
    names = {variant.name: variant for variant in study.variants()}
    assert names[study.NOTHING].techniques == ""
    assert names["SPD alone"].techniques == f"spd:spd_lambda={study.shipped()['spd_lambda']:g}"
    left_out = names["without Cautious"].techniques.split()
    assert sorted([*left_out, "cautious"]) == sorted(names[study.SHIPPED].techniques.split())


def test_differences_are_paired():
    """Seeds that differ by 10 % do not hide a difference of 1 % within each pair. By hand: -1 % ± 4.303 s / sqrt 3."""
    other = study.Variant("other", "peer", "Other")
    pairs = [(1, 0.10, 0.0991), (2, 0.11, 0.1089), (3, 0.09, 0.0890)]
    rows = rows_of(
        *grid(3, 1, 2, 4),
        *grid(3.5, 1.1, 2, 4, optimizer="Other"),
        *(row(0, theirs, seed=seed) for seed, theirs, _ in pairs),
        *(row(0, ours, seed=seed, optimizer="Other") for seed, _, ours in pairs),
    )
    result = quality_report.compare(other, ADAMW, rows)
    assert result is not None
    assert result.difference == pytest.approx(-1.0)
    assert result.margin == pytest.approx(4.303 * 0.1 / math.sqrt(3))  # differences of -0.9, -1.1 and -1.0 %
    assert result.at_the_references_rate == pytest.approx(10.0)
    assert result.verdict == "pays"


def test_the_plot_is_drawn_from_what_is_there(tmp_path: Path):
    rows = study.read_rows(study.RESULTS)
    found = quality_report.results(study.variants(), rows)
    quality_report.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert study.ADAMW in quality_report.table(found, split="report")
