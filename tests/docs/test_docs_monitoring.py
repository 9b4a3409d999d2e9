"""What docs/monitoring.md tells a user to type works, and its tables are what the program does."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from library.record import forgetting
from library.record.metrics import lines
from library.report.__main__ import main as report
from library.training import warning_signs
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
# two steps on images that are encoded when they are needed
SHORT = (
    "--max_train_epochs",
    "0",
    "--max_train_steps",
    "2",
    "--compare_prompts",
    "",
    "--no-loss_plot",
    "--no-cache_latents",
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_every_command_works(monkeypatch, tmp_path, capsys):
    """In a folder as the project's; each run is cut short after two steps."""
    from train_network import main

    for name in ("configs", "quickstart"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "output"
    left = []
    for block in blocks("sh"):
        _, *words = shlex.split(block.replace("\\\n", " "))
        if words[:2] == ["-m", "library.report"]:
            assert report(words[2:]) == 0
        else:
            assert words[0] == "train_network.py"
            for path in out.glob("*"):
                path.unlink()
            assert main([*words[1:], *SHORT]) == 0
        left.append(sorted(path.name.removeprefix("quickstart") for path in out.iterdir()))
        if len(left) == 1:
            for program in blocks("python"):
                exec(program, {})
            printed = capsys.readouterr().out
            assert "quickstart ends with a mean loss of 0." in printed
            assert "quickstart finished\n2 of 2 steps, rank 8" in printed
    everything = ["-metrics.jsonl", "-report.html", "-run.json", ".safetensors"]
    assert left == [everything, everything, everything, [".safetensors"]]
    assert list((tmp_path / "logs").rglob("events*"))


def test_the_table_of_the_record_is_what_it_has(train, tmp_path):
    assert train("--max_train_steps", "1") == 0
    table = json.loads((tmp_path / "out" / "test-run.json").read_text(encoding="utf-8"))
    section = PAGE.partition("## The status of a run")[2].partition("## The steps")[0]
    rows = re.findall(r"^\| (`.*?`) \| (.*) \|$", section, flags=re.MULTILINE)
    assert [name for keys, _ in rows for name in re.findall(r"`(\w+)`", keys)] == list(table)
    facts = next(text for keys, text in rows if keys == "`facts`")
    assert re.findall(r"`(\w+)`", facts) == [*table["facts"], "null"]


def test_the_table_of_values_is_what_a_step_tells(train, tmp_path):
    assert train("--max_train_steps", "1") == 0
    (step,) = [line for line in lines(tmp_path / "out" / "test-metrics.jsonl") if "loss" in line]
    section = PAGE.partition("## The numbers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| `", section, flags=re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert told == step.keys() - {"step"}


def test_the_table_of_signs_is_what_the_rules_find():
    signs = {sign.name: sign for sign in vars(warning_signs).values() if isinstance(sign, warning_signs.Sign)}
    rows = dict(re.findall(r"^\| \*\*(.*?)\*\* \| (.*) \|$", PAGE, flags=re.MULTILINE))
    assert rows.keys() == signs.keys() | {"divergence", "forgetting", "severe forgetting"}  # which other hooks find
    for name, limit in (("forgetting", forgetting.WARNED), ("severe forgetting", forgetting.SEVERE)):
        assert f"more than {100 * limit:g} %" in rows[name]
    for name, sign in signs.items():
        numbers = re.findall(r"--\w+|\d[\d.]*\b(?! %)", sign.text)
        missing = [word for word in numbers if word.rstrip(".") not in rows[name]]
        assert not missing, name


@pytest.mark.parametrize("name", re.findall(r"\(images/(.*?)\)", PAGE))
def test_its_pictures_are_there(name):
    assert (ROOT / "docs" / "images" / name).is_file()
