"""Starting from files of others and on a changed base, through the real command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import BASE
from tests.training.written import weights


def as_peft_names(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """A LoRA of this project in the names of diffusers' own converter, the UNet's part of it."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet")
    paths = {f"lora_unet_{path.replace('.', '_')}": path for path, _ in unet.named_modules()}
    names = {"lora_down": "lora_A", "lora_up": "lora_B"}
    renamed = {}
    for key, tensor in tensors.items():
        module, kind, *_ = key.split(".")
        if module in paths and kind in names:
            renamed[f"unet.{paths[module]}.{names[kind]}.weight"] = tensor
    save_file(renamed, folder / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": '{"unet.lora_alpha": 2}'})
    return renamed


def test_training_goes_on_from_a_file_in_diffusers_names(train, tmp_path, capsys):
    assert train("--output_name", "first") == 0
    first = weights(tmp_path, "first")
    assert len(as_peft_names(first, tmp_path)) == 240
    start = ("--network_weights", str(tmp_path / "pytorch_lora_weights.safetensors"), "--dim_from_weights")
    gentle = ("--network_train_unet_only", "--learning_rate", "1e-7", "--network_dim", "32")
    assert train("--output_name", "second", *start, *gentle) == 0
    assert "120 of the network's 120 modules loaded" in capsys.readouterr().err
    second = weights(tmp_path, "second")
    assert second.keys() == {key for key in first if "unet" in key}
    for key in second:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5)
    assert not all(torch.equal(first[key], second[key]) for key in second)  # it was trained further


LOHA = ["--network_module", "lycoris.kohya", "--network_args", "preset=attn-mlp", "algo=loha"]


def test_a_file_that_does_not_fit_stops_the_run(train, tmp_path, capsys):
    assert train("--output_name", "first", "--max_train_steps", "1") == 0
    start = ("--network_weights", str(tmp_path / "out" / "first.safetensors"))
    for words, said in (
        (["--network_dim", "8"], r"lora_te_text_model_encoder_layers_0.* in the file, \[8, (?s:.*)--dim_from_weights"),
        (LOHA, r"first\.safetensors is a LoRA, and the network here is a LoHa\. It goes with .* algo=lora"),
    ):
        capsys.readouterr()
        assert train("--output_name", "second", *start, *words) == 2
        assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out" / "second.safetensors").exists()


def test_lycoris_starts_from_a_file_in_other_names(train, tmp_path):
    module = ("--network_module", "lycoris.kohya", "--network_args", "algo=lora", "preset=attn-mlp")
    assert train("--output_name", "first", "--network_train_unet_only") == 0
    as_peft_names(weights(tmp_path, "first"), tmp_path)
    start = ("--network_weights", str(tmp_path / "pytorch_lora_weights.safetensors"), "--learning_rate", "1e-7")
    assert train("--output_name", "second", "--network_train_unet_only", *module, *start) == 0
    first, second = weights(tmp_path, "first"), weights(tmp_path, "second")
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cached", [(), ("--network_train_unet_only", "--cache_text_encoder_outputs")])
def test_a_merged_base_is_trained_on(train, tmp_path, cached):
    """The first step's gradient is that of the merged base: with SGD the file shows it."""
    sgd = ("--optimizer_type", "SGD", "--max_grad_norm", "0", "--max_train_steps", "1", *cached)
    assert train("--output_name", "style", "--learning_rate", "1e-2", "--max_train_steps", "2") == 0
    style = str(tmp_path / "out" / "style.safetensors")
    for name, words in (
        ("plain", ()),
        ("merged", ("--base_weights", style)),
        ("undone", ("--base_weights", style, style, "--base_weights_multiplier", "1.5", "-1.5")),
    ):
        assert train("--output_name", name, *sgd, *words) == 0
    plain, merged, undone = (weights(tmp_path, name) for name in ("plain", "merged", "undone"))
    for key in (key for key in plain if key.endswith("lora_up.weight")):
        assert not torch.equal(plain[key], merged[key])
        torch.testing.assert_close(plain[key], undone[key], rtol=0, atol=1e-6)


def test_base_weights_that_are_not_there_are_found_early(train, tmp_path, capsys):
    assert train("--base_weights", str(tmp_path / "none.safetensors")) == 2
    assert "--base_weights" in capsys.readouterr().err
    assert train("--base_weights", "a", "--base_weights_multiplier", "1", "2") == 2
    assert "2 of them for 1 files" in capsys.readouterr().err


def test_a_pickled_file_is_written_and_read(train, tmp_path):
    words = ("--save_model_as", "ckpt", "--save_precision", "fp16", "--save_every_n_steps", "2")
    assert train("--output_name", "a", *words) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("a-metrics.jsonl", "a-step00000002.ckpt", "a-step00000004.ckpt", "a.ckpt"),
    ]
    tensors = torch.load(tmp_path / "out" / "a.ckpt", weights_only=True)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    start = ("--network_weights", str(tmp_path / "out" / "a.ckpt"), "--learning_rate", "1e-7")
    assert train("--output_name", "b", *start) == 0
    again = weights(tmp_path, "b")
    for key in tensors:
        torch.testing.assert_close(tensors[key].float(), again[key], rtol=0, atol=1e-5)
    assert tensors.keys() == again.keys()
