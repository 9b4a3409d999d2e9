"""What docs/rates.md tells a user to type works, and means what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.config import source
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "rates.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(block.replace("\\\n", " "))[2:] for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
]


def run(words: list[str], folder: Path) -> int:
    from train_network import main

    short = ["--max_train_epochs", "0", "--max_train_steps", "1", "--lr_warmup_steps", "0", "--compare_prompts", ""]
    return main([*words, *short, "--output_dir", str(folder)])


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_works(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert run(words, tmp_path) == 0
    assert bool(list(tmp_path.glob("*.safetensors"))) == ("--dry_run" not in words)


@pytest.mark.slow
def test_the_rates_of_loraplus_and_the_layers_that_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (plus,) = (words for words in COMMANDS if "loraplus" in " ".join(words))
    assert run([*plus, "--dry_run"], tmp_path) == 0
    rates = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rates"))
    assert "text_encoder 5e-05, text_encoder_plus 0.0008, unet 0.00025, unet_plus 0.004" in rates
    (named,) = (words for words in COMMANDS if "network_reg_lrs" in " ".join(words))
    assert run(named, tmp_path) == 0
    keys = load_file(tmp_path / "quickstart.safetensors")
    assert any("attn2" in key for key in keys)
    assert not any("_ff_" in key for key in keys)


def test_the_page_names_the_settings_of_networks_lora() -> None:
    signature = source.read_signature("networks.lora.Settings", where="test")
    assert signature is not None
    named = set(re.findall(r"`(\w+)(?:=\S+)?`", PAGE)) & set(signature.parameters)
    rates = {name for name in signature.parameters if {"lr", "lrs"} & set(name.split("_"))}
    assert named == rates
