"""The plan and the table of the study of weight decay's curves; the runs themselves take hours."""

from __future__ import annotations

import pytest

from benchmarks import study
from benchmarks import weight_decay_curves as curves
from benchmarks.weight_decay_curves import Row, Way
from library.config.parser import parse


def row(way: str, seed: int, report: float) -> Row:
    return Row(way, seed, curves.STEPS, curves.RATE, report, report, 1.0)


@pytest.mark.parametrize("way", curves.ways(), ids=lambda way: way.name)
def test_every_way_is_a_command_line(way: Way, tmp_path):
    words = study.words(study.STYLE, curves.RATE, 1, str(tmp_path), *curves.SHARED, *way.more, steps=curves.STEPS)
    config = parse(words)
    assert config.training.max_train_steps == curves.STEPS
    assert config.weight_decay.dynamic_weight_decay == (True if way.name not in ("constant", "none") else None)


def test_the_table_compares_with_the_same_seeds():
    rows = {(r.way, r.seed): r for r in (row("constant", 1, 2.0), row("constant", 2, 4.0), row("adaptive", 1, 2.2))}
    assert curves.table(curves.ways(), rows).splitlines()[2:] == [
        "| constant | 2 | 3.00000 | +0.00 (+0.00 … +0.00) |",
        "| adaptive | 1 | 2.20000 |  |",
    ]
