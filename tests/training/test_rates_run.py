"""Rates by block and layer through the real command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.training.written import weights

BLOCKS = ("--network_args", "down_lr_weight=zeros", "mid_lr_weight=0.5", "network_reg_lrs=.*attn2.*=2e-3")


def test_the_file_has_what_was_trained_and_says_how(train: Any, tmp_path: Path) -> None:
    assert train(*BLOCKS, "--lr_layer_decay", "0.9", "--optimizer_type", "CustomAdamW") == 0
    with safe_open(tmp_path / "out" / "test.safetensors", "pt") as file:
        assert file.metadata()["ss_lr_layer_decay"] == "0.9"
        assert '"down_lr_weight": "zeros"' in file.metadata()["ss_network_args"]
        assert not any("_down_blocks_" in key for key in file.keys())  # noqa: SIM118 - no dict
        ups = [file.get_tensor(key) for key in file.keys() if key.endswith("lora_up.weight")]  # noqa: SIM118
    assert all(up.any() for up in ups)


@pytest.mark.slow
def test_layers_with_a_rate_of_zero_are_not_in_the_file(train: Any, tmp_path: Path, capsys: Any) -> None:
    """Unless they came from a file with something in them. A resumed run writes what an unbroken one does."""
    frozen = ("--network_args", "network_reg_lrs=.*attn2.*=0")
    assert train(*frozen, "--output_name", "whole", "--save_every_n_steps", "2", "--save_state") == 0
    assert "unet_reg_lr_0: 40 of these add nothing and are not in the file:\n" in capsys.readouterr().err
    whole = weights(tmp_path, "whole")
    assert whole
    assert not any("attn2" in key for key in whole)
    assert all(tensor.any() for key, tensor in whole.items())
    state = ("--resume", str(tmp_path / "out" / "whole-step00000002-state"))
    assert train(*frozen, "--output_name", "resumed", *state) == 0
    assert weights(tmp_path, "resumed").keys() == whole.keys()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in weights(tmp_path, "resumed").items())

    assert train("--output_name", "all", "--max_train_steps", "1") == 0
    start = ("--network_weights", str(tmp_path / "out" / "all.safetensors"))
    assert train(*frozen, *start, "--output_name", "further") == 0
    before, after = weights(tmp_path, "all"), weights(tmp_path, "further")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) == ("attn2" in key) for key in after if key.endswith("up.weight"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--network_train_unet_only", "--text_encoder_lr", "1e-5"),
            "--text_encoder_lr has no effect: with --network_",
        ),
        (
            ("--network_train_text_encoder_only", "--unet_lr", "1e-4"),
            "--unet_lr has no effect: with --network_train_text",
        ),
        (("--network_train_unet_only", "--text_encoder_lr", "0", "--unet_lr", "1e-4"), ""),
    ],
)
@pytest.mark.slow
def test_a_rate_of_what_is_not_trained(words: Any, said: str, train: Any, capsys: Any) -> None:
    assert train(*words, "--dry_run") == 0
    error = capsys.readouterr().err
    assert said in error
    assert ("_lr has no effect" in error) == bool(said)


@pytest.mark.slow
def test_a_threshold_goes_with_weights_of_blocks(train: Any, capsys: Any) -> None:
    words = ("--network_args", "block_lr_zero_threshold=0.1")
    assert train(*words, "down_lr_weight=linear", "--dry_run") == 0
    assert "get no adapter" in capsys.readouterr().err
    assert train(*words, "--dry_run") == 2
    assert "block_lr_zero_threshold needs" in capsys.readouterr().err


@pytest.mark.slow
def test_many_rates_are_told_in_short(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--lr_layer_decay", "0.9", "--dry_run") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rates"))
    assert "groups from" in line
    assert "to 0.001; constant" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--network_args", "network_reg_lrs=atn2=1"), "network_reg_lrs: 'atn2' matches nothing"),
        (("--network_args", "down_lr_weight=cosin"), "did you mean 'cosine'"),
        (("--network_module", "lycoris.kohya", "--lr_layer_decay", "0.9"), "lycoris.kohya has no rates by layer"),
    ],
)
def test_mistakes_end_before_training(words: Any, message: str, train: Any, capsys: Any) -> None:
    assert train(*words) == 2
    assert message in capsys.readouterr().err
