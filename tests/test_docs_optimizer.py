"""What docs/optimizer.md tells a user to type works, and its table of defaults is CustomAdamW's."""

from __future__ import annotations

import inspect
import re
import shlex

import pytest
import torch

from library.optimizers import CustomAdamW
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "optimizer.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("block", [block for block in blocks("sh") if "train_network.py" in block])
def test_every_command_trains(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from train_network import main

    monkeypatch.chdir(ROOT)
    _, _, *words = shlex.split(block.replace("\\\n", " "))
    short = ["--max_train_epochs", "0", "--max_train_steps", "1", "--compare_prompts", ""]
    assert main([*words, *short, "--output_dir", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*.safetensors"))


def test_the_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks("python")
    torch.manual_seed(0)
    exec(program, {})
    assert "CustomAdamW(8-bit" in capsys.readouterr().out


def test_the_defaults_of_the_table() -> None:
    parameters = inspect.signature(CustomAdamW).parameters
    rows = re.findall(r"^\| `--(\w+)`(?:, `--(\w+)`)? \| (on|off)(?:, ([\d.]+))? \|", PAGE, flags=re.MULTILINE)
    assert len(rows) == 9
    for switch, setting, on, value in rows:
        assert parameters[switch].default is (on == "on"), switch
        if setting:
            assert parameters[setting].default == float(value), setting
