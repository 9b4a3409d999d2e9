"""What docs/troubleshooting.md tells a user to type works, and it has every sign, chart and option by its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from library.config.options import declared_options
from library.report import charts
from library.training import warning_signs
from library.training.warning_signs import Sign
from tests.conftest import ROOT, forget_accelerator
from tests.docs.tables import commands, options_named, page, tables

PAGE = page("troubleshooting")
SIGNS = tables(PAGE)["symptom | sign | chart | lever, the first one first"]


def test_the_commands_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from library.report.__main__ import main as report
    from train_network import main

    monkeypatch.chdir(ROOT)
    train, again = commands(PAGE)
    short = ["--max_train_epochs", "0", "--max_train_steps", "1", "--compare_prompts=", "--output_dir", str(tmp_path)]
    assert main([*train[2:], *short, "--max_validation_steps", "1", "--no-loss_plot"]) == 0
    forget_accelerator()
    assert again[1:3] == ["-m", "library.report"]
    assert report([str(tmp_path)]) == 0


def test_every_option_of_the_page_exists() -> None:
    assert options_named(PAGE) - {"advise"} <= declared_options().keys()


def test_it_has_every_sign() -> None:
    """Those of the rules, and those that other parts report by the same way."""
    known = {value.name for value in vars(warning_signs).values() if isinstance(value, Sign)}
    assert {row[1] for row in SIGNS} == known | {"divergence", "forgetting", "severe forgetting"}
    named = set(re.findall(r"^\| \*\*([a-z ]+)\*\* \|", page("monitoring"), flags=re.MULTILINE))
    assert named == {row[1] for row in SIGNS}


def test_the_levers_of_a_sign_are_among_those_that_the_log_names() -> None:
    texts = {value.name: value.text for value in vars(warning_signs).values() if isinstance(value, Sign)}
    for row in SIGNS:
        if row[1] in texts:
            assert options_named(texts[row[1]]) & options_named(row[3]) or row[1] == "collapse", row[1]


def test_the_charts_are_those_of_the_report() -> None:
    source = Path(charts.__file__).read_text(encoding="utf-8")
    titles = set(re.findall(r'(?:Chart|_of_groups)\(\s*"([^"]+)"', source))
    named = {name.strip() for row in SIGNS for name in row[2].split(", ")}
    assert named <= titles
    assert set(re.findall(r"chart ([A-Z][\w' ]+?)(?: near|:)", PAGE)) <= titles
