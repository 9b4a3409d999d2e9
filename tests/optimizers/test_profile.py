"""python -m library.optimizers.profile: which optimizers it measures, on what, and what it counts; not the times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.optimizers import profile
from library.optimizers.custom_adamw.techniques import techniques


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    tensors = {
        "lora_unet_a.lora_down.weight": torch.zeros(16, 320),
        "lora_unet_a.lora_up.weight": torch.zeros(640, 16),
        "lora_unet_a.alpha": torch.tensor(8.0),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_the_table(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main([str(lora), "--rounds", "1", "--device", "cpu", "--optimizer", "Lion8bit"]) == 0
    said = capsys.readouterr().out
    assert "2 tensors, 15,360 numbers; 1 rounds on cpu" in said
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")][1:]
    names = [row[0].removeprefix("| ") for row in rows]
    assert names[0] == profile.BASELINE
    assert {f"{kind.name} alone" for kind in techniques()} <= set(names)
    assert names[-1] == "Lion8bit"
    size = {name: float(row[-1].removesuffix(" |")) for name, row in zip(names, rows, strict=True)}
    assert size["CustomAdamW, nothing on, 32 bits"] == 8.0
    assert size["CustomAdamW, nothing on"] == 2.03
    assert all(1 < value < 9 for value in size.values())


def test_an_optimizer_that_wants_more_than_gradients() -> None:
    layer = torch.nn.Linear(4, 4)
    chosen = {
        profile.BASELINE: profile.choose_optimizer("AdamW", []),
        "torch.optim.LBFGS": profile.choose_optimizer("torch.optim.LBFGS", []),
    }
    with pytest.raises(UserError, match=r"torch\.optim\.LBFGS: its step cannot be measured"):
        profile.measure(list(layer.named_parameters()), chosen)


def test_a_program_s_own_parameters() -> None:
    layer = torch.nn.Linear(64, 64)
    chosen = {name: choice for name, choice in profile.contenders().items() if "AdamW" in name}
    rows = profile.measure(list(layer.named_parameters()), chosen, rounds=3)
    assert [row.name for row in rows] == list(chosen)
    assert rows[0].ratio == 1.0
    assert all(row.milliseconds > 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.safetensors",), "nowhere.safetensors: no such file"),
        (("lora.safetensors", "--optimizer", "AdamW8bits"), "did you mean 'AdamW8bit'?"),
        (("lora.safetensors", "--device", "gpu"), "error: --device gpu: "),
    ],
)
def test_mistakes(
    words: tuple[str, ...],
    message: str,
    lora: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(lora.parent)
    assert profile.main(list(words)) == 2
    assert message in capsys.readouterr().err
