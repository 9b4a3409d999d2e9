"""The plan and the statistics that all studies share; the runs themselves take hours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import study
from benchmarks.rows import append


@dataclass(frozen=True)
class Toy:
    name: str
    middle: float = 2e-3

    @property
    def filed(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True)
class ToyRow:
    name: str
    rate: float
    seed: int
    steps: int
    validation: float
    report: float
    seconds: float

    @property
    def filed(self) -> tuple[str, ...]:
        return (self.name,)


FIRST, OTHER = Toy("first"), Toy("other", middle=1e-4)


def rows_of(*rows: ToyRow) -> dict[study.Key, ToyRow]:
    return {study.key_of(row): row for row in rows}


def row(power: int, loss: float, *, seed: int = study.CHOOSING_SEED, of: Toy = FIRST) -> ToyRow:
    return ToyRow(of.name, study.rate(of, power), seed, study.STEPS, loss, loss, 1.0)


def grid(*losses: float, of: Toy = FIRST) -> list[ToyRow]:
    return [row(power, loss, of=of) for power, loss in zip(study.GRID, losses, strict=True)]


@pytest.mark.parametrize("variant", [FIRST, OTHER], ids=lambda variant: variant.name)
def test_the_grid_comes_first_and_seeds_after_it(variant: Toy):
    assert study.missing(variant, {}, 3) == [(study.rate(variant, power), 0) for power in study.GRID]
    rows = rows_of(*grid(3, 1, 2, 4, of=variant))
    assert study.best_power(variant, rows) == 0
    assert study.missing(variant, rows, 3) == [(variant.middle, seed) for seed in (1, 2, 3)]
    rows |= rows_of(row(0, 1, seed=2, of=variant))
    assert study.missing(variant, rows, 3) == [(variant.middle, 1), (variant.middle, 3)]


@pytest.mark.parametrize(("losses", "power"), [((1, 2, 3, 4), -2), ((4, 3, 2, 1), 3), ((1, math.inf, 3, 4), -2)])
def test_the_grid_grows_while_its_best_rate_is_at_the_edge(losses: tuple[float, ...], power: int):
    rows = rows_of(*grid(*losses))
    assert study.best_power(FIRST, rows) is None
    assert study.missing(FIRST, rows, 3) == [(study.rate(FIRST, power), 0)]


def test_the_grid_ends_somewhere():
    rows = rows_of(*(row(power, -power) for power in range(study.GRID[0], study.MOST + 1)))
    assert study.best_power(FIRST, rows) == study.MOST


def test_rows_survive_the_file(tmp_path: Path):
    path = tmp_path / "rows.csv"
    rows = [row(0, 0.1 + 0.2), ToyRow("b c:d=1", 1e-3, 7, study.STEPS, math.inf, math.nan, 2.5)]
    for each in rows:
        append(path, each)
    append(path, ToyRow("first", 1e-3, 7, study.STEPS + 1, 0.1, 0.1, 2.5))  # of another length of training
    found = list(study.read_rows(path, ToyRow).values())
    assert found[0] == rows[0]
    assert math.isnan(found[1].report)
    assert found[1].validation == math.inf
    assert len(found) == 2


PAIRS = [(1, 0.10, 0.0991), (2, 0.11, 0.1089), (3, 0.09, 0.0890)]


@pytest.mark.parametrize("middle", [2e-3, 4e-3])
def test_differences_are_paired(middle: float):
    """Seeds that differ by 10 % do not hide a difference of 1 % within each pair. By hand: -1 % ± 4.303 s / sqrt 3."""
    other = Toy("other", middle)
    rows = rows_of(
        *grid(3, 1, 2, 4),
        *grid(3.5, 1.1, 2, 4, of=other),
        *(row(0, theirs, seed=seed) for seed, theirs, _ in PAIRS),
        *(row(0, ours, seed=seed, of=other) for seed, _, ours in PAIRS),
    )
    result = study.compare(other, FIRST, rows)
    assert result is not None
    assert result.difference == pytest.approx(-1.0)
    assert result.margin == pytest.approx(4.303 * 0.1 / math.sqrt(3))  # differences of -0.9, -1.1 and -1.0 %
    assert result.verdict == "pays"
    # the rate that suits the reference is 2e-3: the other's middle, or the power -1 of its grid
    assert result.at_the_references_rate == pytest.approx(10.0 if middle == 2e-3 else 250.0)


def test_a_run_that_diverged_is_no_pair_with_an_interval():
    rows = rows_of(
        *grid(3, 1, 2, 4),
        *grid(3, 1, 2, 4, of=OTHER),
        *(row(0, theirs, seed=seed) for seed, theirs, _ in PAIRS),
        *(row(0, math.inf if seed == 2 else ours, seed=seed, of=OTHER) for seed, _, ours in PAIRS),
    )
    result = study.compare(OTHER, FIRST, rows)
    assert result is not None
    assert (result.verdict, result.interval) == ("diverged", "")


def test_one_seed_is_compared_with_nothing():
    rows = rows_of(*grid(3, 1, 2, 4), *grid(3, 1, 2, 4, of=OTHER), row(0, 1, seed=1), row(0, 2, seed=1, of=OTHER))
    assert study.compare(OTHER, FIRST, rows) is None


def test_the_interval_is_students():
    """Of 1, 2 and 3 the mean is 2 and the deviation 1; t of two degrees of freedom is 4.303."""
    assert study.interval([1.0, 2.0, 3.0]) == f"+2.00 ({2 - 4.303 / 3**0.5:+.2f} … {2 + 4.303 / 3**0.5:+.2f})"
    assert study.interval([1.0]) == ""


@pytest.mark.slow
def test_an_adapter_on_an_encoded_base_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `benchmarks.format_quality` has it: nothing can be merged into such a base."""
    latents, captions = study.held_out(study.STYLE / "validation")
    monkeypatch.setattr(study, "held_out", lambda folder: (latents[:4], captions[:4]))
    words = ("--network_module", "networks.lora", "--base_format", "int8")
    found = study.train_and_judge(study.STYLE, 1e-3, study.CHOOSING_SEED, *words, steps=1)
    assert 0 < found.validation < 1  # 1: what answering 0 would have
    assert math.isnan(found.report)
