"""What docs/language-models.md tells a user to type works, and its tables are those of the code."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

import finetune_language_model
from fine_tuning import small_models
from fine_tuning.instructions import read_line
from fine_tuning.language_models import ADAPTERS, load_base
from library.optimizers.task_rates import FULL_RATES, LORA_RATES
from tests.conftest import ROOT
from tests.docs.tables import commands, number, page, tables

PAGE = page("language-models")
TABLES = tables(PAGE)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, instructions and the images that the page names."""
    tokenizer = small_models.tokenizer()
    base = tmp_path / "path" / "to" / "a" / "model"
    load_base(None, len(tokenizer), in_4bit=False, checkpointing=False).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lines = small_models.instructions("sort", 60)
    (tmp_path / "my.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "quickstart").symlink_to(ROOT / "quickstart")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str], *, steps: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of the page, in `steps` steps; what it prints goes into the file behind >."""
    words, target = (words[:-2], words[-1]) if ">" in words else (words, None)
    shorter = [] if "small_models" in words[1] else ["--steps", steps]
    monkeypatch.setattr(sys, "argv", [*words[1:], *shorter])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    assert end.value.code == 0, words
    if target is not None:
        Path(target).write_text(capsys.readouterr().out, encoding="utf-8")


def test_every_command_works(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in commands(PAGE):
        run(command, steps="2", capsys=capsys, monkeypatch=monkeypatch)
    assert (workplace / "reverse-adapter" / "adapter_model.safetensors").is_file()
    assert (workplace / "my-adapter" / "adapter_config.json").is_file()


def test_all_options_of_the_page_exist() -> None:
    named = set(re.findall(r"`--(\w+)", PAGE))
    known = vars(finetune_language_model.options([])).keys() | {"images", "augment"}
    assert named <= known


def test_the_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(program, {})
    assert capsys.readouterr().out == "['8.1e-06', '9e-06', '1e-05', '1e-05']\n"  # of all weights, for generation


def test_each_kind_of_line() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = [read_line(line, small_models.tokenizer(), place="the page") for line in block.splitlines()]
    assert [line.turns[0].answer.removesuffix("<|end|>") for line in lines] == [
        "la mer", "Four.", "A text, all of which is learnt.",
    ]  # fmt: skip


@pytest.mark.parametrize(("start", "rates"), [("LoRA for", LORA_RATES), ("all weights, for", FULL_RATES)])
def test_the_rates(start: str, rates: dict[str, tuple[float, ...]]) -> None:
    (rows,) = (rows for head, rows in TABLES.items() if head.startswith(start))
    found = {task: tuple(map(number, row[1:])) for row in rows for task in row[0].split(", ")}
    assert found == rates


def test_the_adapters() -> None:
    rows = dict(row[:2] for row in TABLES["option | default |"])
    first = next(row for row in TABLES["option | default |"] if row[0] == "`--adapter`")
    assert (rows["`--adapter`"], *re.findall(r"`(\w+)`", first[2])) == ADAPTERS
    wanted = finetune_language_model.options([])
    finetune_language_model.check(wanted)
    assert (str(wanted.rank), wanted.alpha, str(wanted.dropout)) == (rows["`--rank`"], 32, rows["`--dropout`"])
