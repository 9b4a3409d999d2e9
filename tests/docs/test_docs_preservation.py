"""What docs/preservation.md tells a user to type works: the preserved images keep the LoRA from changing them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "preservation.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return found


def delta(file: Path) -> float:
    """The norm of what the LoRA adds, over all layers; alpha is the rank."""
    tensors = load_file(file)
    ups = {key: up.float().flatten(1) for key, up in tensors.items() if key.endswith("lora_up.weight")}
    downs = {key: tensors[key.replace("lora_up", "lora_down")].float().flatten(1) for key in ups}
    return sum(float((up @ downs[key]).square().sum()) for key, up in ups.items()) ** 0.5


@pytest.mark.slow
def test_the_example_trains_and_changes_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Steps of Adam have the same size whatever the loss; how far they lead tells whether they are all one way."""
    from train_network import main

    monkeypatch.chdir(ROOT)
    _, _, *words = shlex.split(block("sh").replace("\\\n", " "))
    (tmp_path / "preserved.toml").write_text(block("toml"), encoding="utf-8")
    (tmp_path / "plain.toml").write_text(
        block("toml").split('  [[datasets.subsets]]\n  image_dir = "quickstart/images/report"')[0]
    )
    words[words.index("preserved.toml")] = "{}"
    short = ["--max_train_epochs", "0", "--max_train_steps", "12", "--compare_prompts", "", "--lr_warmup_steps", "0"]
    for name in ("preserved", "plain"):
        own = [str(tmp_path / f"{name}.toml") if word == "{}" else word for word in words]
        assert (
            main([*own, *short, "--output_dir", str(tmp_path), "--output_name", name, "--save_precision", "float"]) == 0
        )
    assert 0 < delta(tmp_path / "preserved.safetensors") < delta(tmp_path / "plain.safetensors")
