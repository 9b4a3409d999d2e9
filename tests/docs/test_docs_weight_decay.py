"""What docs/weight-decay.md tells a user to type works, and its tables have the numbers that the code computes."""

from __future__ import annotations

import csv
import math
import re
import statistics
from pathlib import Path

import pytest

from library.config.options import declared_options
from library.optimizers import auto_weight_decay
from library.optimizers.auto_weight_decay import Complexity
from library.optimizers.plateau import Plateau
from library.optimizers.weight_decay import VANISHED, Curve
from tests.conftest import ROOT
from tests.docs.tables import commands, number, options_named, page, tables

PAGE = page("weight-decay")
TABLES = tables(PAGE)


def table(start: str) -> list[list[str]]:
    (found,) = (rows for head, rows in TABLES.items() if head.startswith(start))
    return found


def head(start: str) -> list[str]:
    (found,) = (head for head in TABLES if head.startswith(start))
    return found.split(" | ")


@pytest.mark.parametrize("command", commands(PAGE), ids=" ".join)
def test_every_command_works(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from train_network import main

    monkeypatch.chdir(ROOT)
    short = ["--max_train_epochs", "0", "--max_train_steps", "2", "--compare_prompts=", "--output_dir", str(tmp_path)]
    assert main([*command[2:], *short, "--no-report", "--no-loss_plot"]) == 0


def test_every_option_of_the_page_exists() -> None:
    assert options_named(PAGE) <= declared_options().keys()


def shrunk(steps: int, rate: float, decay: float, *, falls: bool, cosine: bool) -> float:
    """By how many percent weights shrink over a run from weight decay alone."""
    curve, logarithm = Curve(), 0.0
    for step in range(1, steps + 1):
        share = (1 + math.cos(math.pi * step / steps)) / 2 if cosine else 1.0
        logarithm += math.log1p(-rate * share * decay * (curve.factor(step) if falls else 1.0))
    return 100 * (1 - math.exp(logarithm))


@pytest.mark.parametrize("row", table("steps | rate"), ids=lambda row: " ".join(row[:3]))
def test_how_much_weights_shrink(row: list[str]) -> None:
    steps, rate, decay, *shown = map(number, row)
    found = [shrunk(int(steps), rate, decay, falls=f, cosine=c) for c in (False, True) for f in (False, True)]
    for value, cell in zip(found, row[3:], strict=True):
        digits = len(cell.partition(".")[2])
        assert f"{value:.{digits}f}" == cell
    assert len(shown) == 4


def test_the_curve() -> None:
    steps = [int(cell) for cell in head("step | 1000 | 1500 | 2000 | 3000")[1:]]
    default, endless = table("step | 1000 | 1500 | 2000 | 3000")
    assert default[1:] == [f"{Curve().factor(step):.2f}" for step in steps]
    curve = Curve(max_progress=math.inf)
    assert endless[1:] == [f"{curve.factor(step):.2f}" for step in steps]
    assert curve.factor(steps[-1] - 1) > curve.factor(steps[-1]) == curve.factor(10**6)  # the floor begins there


def test_the_shapes() -> None:
    steps = [int(cell) for cell in head("step | 1000 | 1500 | 2000 | 2500")[1:]]
    for name, *cells in table("step | 1000 | 1500 | 2000 | 2500"):
        stages = ((0, 1.0), (1000, 0.7), (3000, 0.4)) if name == "`multi_stage`" else ()
        curve = Curve(name.strip("`"), stages=stages)
        assert cells == [f"{curve.factor(step):.2f}" for step in steps]


def test_the_numbers_of_the_adaptive_curve_and_of_nothing_left() -> None:
    flat = Plateau()
    assert f"the last {flat.window} losses, with its error, is below {flat.slope:g} a step" in PAGE
    assert f"and {flat.earliest} steps are done" in PAGE
    assert f"Below {VANISHED:.0e} ".replace("e-0", "e-") in PAGE


def test_the_transition_by_task() -> None:
    lengths = [int(number(cell.removesuffix(" steps"))) for cell in head("task | T, claimed")[2:]]
    for task, _, *cells in table("task | T, claimed"):
        named = None if task == "none named" else task.strip("`")
        found = [auto_weight_decay.transition_steps(length, named)[0] for length in lengths]
        assert [int(cell) for cell in cells] == found


def test_the_factors() -> None:
    for factor, *cells, _ in table("factor | p = 0.5"):
        assert cells == [f"{float(factor) ** p:.2f}" for p in (0.5, 1, 1.5, 2)]


def test_the_factors_by_task() -> None:
    shown = {
        domain.strip("`"): {name: float(value) for name, value in re.findall(r"`(\w+)` ([\d.]+)", cell)}
        for domain, cell in table("domain | task")
    }
    assert shown == auto_weight_decay.FACTORS


def test_the_numbers_by_images() -> None:
    for images, factor, least in table("images | factor by"):
        count = 10**6 if images == "more" else int(number(images.removeprefix("below "))) - 1
        assert auto_weight_decay.decay_factor(count, None)[0] == float(factor)
        assert auto_weight_decay.min_ratio(count)[0] == float(least)


def test_the_least_share_by_complexity() -> None:
    for images, *cells in table("images | complexity"):
        for ratio, cell in zip((0.5, 1, 2), cells, strict=True):
            complexity = Complexity(int(ratio * 1000), 1000)
            found, _ = auto_weight_decay.min_ratio_of(complexity, images=int(number(images)))
            assert float(f"{found:.3f}") == float(cell)


def test_what_was_measured() -> None:
    """The differences are those of docs/optimizer.md, whose table comes from the study; the length is the study's."""
    study = page("optimizer")
    for name in ("dynamic weight decay alone", "without dynamic weight decay"):
        (row,) = re.findall(rf"^\| {name} \|.*$", study, flags=re.MULTILINE)
        (value,) = re.findall(r"\| ([-+][\d.]+) \(", row)
        assert f"{value.replace('-', '−')} %" in PAGE
    with (ROOT / "benchmarks" / "results" / "optimizer_quality.csv").open(encoding="utf-8") as file:
        lengths = {row["steps"] for row in csv.DictReader(file)}
    assert lengths == {"160"}
    assert "These runs have 160 steps" in PAGE
    assert statistics.fmean(Curve().factor(step) for step in range(1, 161)) == 1.0
