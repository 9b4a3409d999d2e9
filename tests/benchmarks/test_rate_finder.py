"""The study of the rate finder: its rows, and (slow) what it is there to show, on one seed and fewer steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import rate_finder
from benchmarks.rate_finder import Row
from tests.conftest import ROOT


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [Row(1, "steepest", 0.1, 2e-4, 0.2, 160, 0.08), Row(1, "tenth", 1.0, 1e-3, 1.0, 160, float("inf"))]
    for row in rows:
        rate_finder.append(tmp_path / "rows.csv", row)
    assert rate_finder.read_rows(tmp_path / "rows.csv") == rows


def test_the_suggestion_was_better_than_ten_times_more_and_less() -> None:
    """The study as it was run, each seed with its own suggestion."""
    losses = {(row.seed, row.rule, row.multiple): row.loss for row in rate_finder.read_rows(rate_finder.RESULTS)}
    for seed in (1, 2, 3):
        assert losses[seed, "steepest", 1.0] < min(losses[seed, "steepest", 0.1], losses[seed, "steepest", 10.0])


@pytest.mark.slow
def test_the_suggestion_is_better_than_ten_times_more_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(ROOT)
    factor = rate_finder.suggested(4)["steepest"]
    losses = []
    for multiple in (1.0, 0.1, 10.0):
        AcceleratorState._reset_state(reset_partial_state=True)
        losses.append(rate_finder.train_and_judge(4, factor * multiple, "--max_train_epochs", "3")[0])
    assert losses[0] < min(losses[1:])
