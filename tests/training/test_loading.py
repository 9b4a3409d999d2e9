"""Starting from files of others and on a changed base, through the real command line."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.files.header import read_metadata
from networks import base_weights
from networks.tools.__main__ import main as tools
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_lycoris_starts_from_a_file_in_other_names(train, tmp_path):
    module = ("--network_module", "lycoris.kohya", "--network_args", "algo=lora", "preset=attn-mlp")
    assert train("--output_name", "first", "--network_train_unet_only") == 0
    as_peft_names(weights(tmp_path, "first"), tmp_path)
    start = ("--network_weights", str(tmp_path / "pytorch_lora_weights.safetensors"), "--learning_rate", "1e-7")
    assert train("--output_name", "second", "--network_train_unet_only", *module, *start) == 0
    first, second = weights(tmp_path, "first"), weights(tmp_path, "second")
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "cached",
    [(), pytest.param(("--network_train_unet_only", "--cache_text_encoder_outputs"), marks=pytest.mark.slow)],
)
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


@pytest.mark.slow
def test_a_file_says_which_loras_its_base_was_merged_with(train, tmp_path, capsys):
    """Metadata, dry run, report and the tools; a run that starts from it without them is warned."""
    assert train("--output_name", "style") == 0
    assert train("--output_name", "face", "--save_model_as", "ckpt") == 0
    style, face = tmp_path / "out" / "style.safetensors", tmp_path / "out" / "face.ckpt"
    base = ("--base_weights", str(style), str(face), "--base_weights_multiplier", "0.7")
    capsys.readouterr()
    assert train("--output_name", "top", "--report", *base) == 0
    assert f"merged into it: {style} × 0.7, {face} × 1" in capsys.readouterr().err
    top = tmp_path / "out" / "top.safetensors"
    told = "style.safetensors × 0.7, face.ckpt × 1"
    assert json.loads(read_metadata(top)["ss_base_weights"]) == [
        {
            "name": "style.safetensors",
            "multiplier": 0.7,
            "sha256": hashlib.sha256(style.read_bytes()).hexdigest(),
            "sshs_model_hash": read_metadata(style)["sshs_model_hash"],
        },
        {
            "name": "face.ckpt",
            "multiplier": 1.0,
            "sha256": hashlib.sha256(face.read_bytes()).hexdigest(),
            "sshs_model_hash": None,
        },
    ]
    assert "ss_base_weights" not in read_metadata(style)
    assert f"on top of {told}" in (tmp_path / "out" / "top-report.html").read_text(encoding="utf-8")

    converted = tmp_path / "out" / "converted.safetensors"
    assert tools(["convert", str(top), str(converted), "--to", "diffusers"]) == 0
    assert f"acts as it was trained only on top of {told}" in capsys.readouterr().err
    assert read_metadata(converted)["ss_base_weights"] == read_metadata(top)["ss_base_weights"]

    start = ("--output_name", "further", "--network_weights", str(top), "--dry_run")
    assert train(*start, *base) == 0
    assert "was trained on top of" not in capsys.readouterr().err
    assert train(*start, *base[:2], "--base_weights_multiplier", "0.5") == 0
    lacking = f"--network_weights {top}: was trained on top of {told}, which --base_weights does not merge here"
    assert lacking in capsys.readouterr().err
    assert train("--output_name", "further", "--base_weights", str(top), *base[1:3], "--dry_run") == 0
    lacking = f"--base_weights {top}: was trained on top of style.safetensors × 0.7, which --base_weights does not"
    assert lacking in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no JSON", "3", "[3]", '[{"name": "x"}]', '[{"name": "x", "multiplier": "y"}]'])
def test_a_record_of_another_program_is_none(tmp_path, text):
    save_file({"lora_unet_x.alpha": torch.ones(1)}, tmp_path / "x.safetensors", {base_weights.KEY: text})
    assert base_weights.read(tmp_path / "x.safetensors") == []


def test_base_weights_that_are_not_there_are_found_early(train, tmp_path, capsys):
    assert train("--base_weights", str(tmp_path / "none.safetensors")) == 2
    assert "--base_weights" in capsys.readouterr().err
    assert train("--base_weights", "a", "--base_weights_multiplier", "1", "2") == 2
    assert "2 of them for 1 files" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pickled_file_is_written_and_read(train, tmp_path):
    words = ("--save_model_as", "ckpt", "--save_precision", "fp16", "--save_every_n_steps", "2")
    assert train("--output_name", "a", *words) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("a-metrics.jsonl", "a-run.json", "a-step00000002.ckpt", "a-step00000004.ckpt", "a.ckpt"),
    ]
    tensors = torch.load(tmp_path / "out" / "a.ckpt", weights_only=True)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    start = ("--network_weights", str(tmp_path / "out" / "a.ckpt"), "--learning_rate", "1e-7")
    assert train("--output_name", "b", *start) == 0
    again = weights(tmp_path, "b")
    for key in tensors:
        torch.testing.assert_close(tensors[key].float(), again[key], rtol=0, atol=1e-5)
    assert tensors.keys() == again.keys()
