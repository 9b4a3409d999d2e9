"""What docs/optimizer.md tells a user to type works."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from safetensors.torch import save_file

from library.optimizers import profile
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


def test_the_command_that_measures(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    """On a small file in the place of the one that an earlier command wrote."""
    (command,) = [shlex.split(block) for block in blocks("sh") if "train_network.py" not in block]
    _, flag, module, *words = command
    assert (flag, module) == ("-m", profile.__name__)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    tensors = {"a.lora_down.weight": torch.zeros(8, 64), "a.lora_up.weight": torch.zeros(64, 8)}
    save_file(tensors, tmp_path / "output" / "quickstart.safetensors")
    assert profile.main(words) == 0
    assert "| pytorch_optimizer.CAME |" in capsys.readouterr().out


def test_the_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    program, _ = blocks("python")  # the other one is a technique: test_custom_adamw_new_technique.py
    torch.manual_seed(0)
    exec(program, {})
    assert "CustomAdamW(8-bit" in capsys.readouterr().out
