"""The study of ways against forgetting: its commands are ones that the trainer takes, and its table is in numbers."""

from __future__ import annotations

from pathlib import Path

from benchmarks import forgetting
from benchmarks.forgetting import Row, Way, table, ways
from library.config import parser


def test_every_way_is_a_command(tmp_path: Path) -> None:
    names = [way.name for way in ways()]
    assert names[0] == "none"
    assert len(set(names)) == len(names)
    for way in ways():
        parser.parse(
            forgetting._words(tmp_path, "twemoji", 1, "--network_weights", "x", *way.more, replays=way.replays)
        )


def test_rows_of_other_settings_are_not_read(tmp_path: Path) -> None:
    from benchmarks import rows

    for steps in (forgetting.STEPS, 5):
        rows.append(tmp_path / "a.csv", Row("none", steps, steps, forgetting.RATE, 1.0, 1.0, 1.0, 1.0))
    assert list(forgetting.read_rows(tmp_path / "a.csv")) == [("none", forgetting.STEPS)]


def test_the_table() -> None:
    def row(way: str, seed: int, flat: float, own: float) -> Row:
        return Row(way, seed, forgetting.STEPS, forgetting.RATE, flat, 0.5, own, 1.0)

    found = [row("base", 0, 2.0, 1.0), *(row("first", seed, 1.0, 1.2) for seed in (1, 2, 3))]
    found += [row("none", seed, 1.5, 1.0 + 0.1 * seed) for seed in (1, 2, 3)]
    found += [row("ewc", seed, 1.2, 1.0) for seed in (1, 2)]
    wanted = [Way("none"), Way("ewc"), Way("not there")]
    lines = table(wanted, {(one.way, one.seed): one for one in found}).splitlines()
    assert lines[2] == ("| none | 3 | +50.00 (+50.00 … +50.00) | +0.00 (+0.00 … +0.00) | +20.00 (-4.84 … +44.84) |  |")
    assert lines[3].endswith("| -20.00 (-20.00 … -20.00) |")
    assert len(lines) == 4
