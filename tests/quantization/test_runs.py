"""Whole runs on a base whose frozen weights are packed, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.models.components import Components
from library.quantization import FORMATS
from library.quantization.packed import PackedWeight
from tests.conftest import BASE
from tests.merging import merge_into
from tests.training.written import distance, same, weights

Train = Callable[..., int]
FEATURES = (
    *("--ema_decay", "0.5", "--ema_for", "validate", "--validation_split", "0.3", "--validate_every_n_steps", "2"),
    *("--gradient_checkpointing", "--network_args", "conv_dim=2"),
)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    train: Train, tmp_path: Path, format: str, precision: str
) -> None:
    """With the text encoder trained, an EMA, validation and samples."""
    if (format, precision) == ("fp8", "no"):
        pytest.skip("refused: see test_sdxl_runs.py")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 1 --w 64 --h 64\n", encoding="utf-8")
    words = ("--base_format", format, "--mixed_precision", precision, *FEATURES)
    samples = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2")
    assert train(*words, *samples, "--output_name", "whole", "--save_every_n_steps", "2", "--save_state") == 0
    state = tmp_path / "out" / "whole-step00000002-state"
    assert train(*words, *samples, "--output_name", "again", "--resume", str(state)) == 0
    found = weights(tmp_path, "whole")
    assert same(found, weights(tmp_path, "again"))
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert any(tensor.any() for name, tensor in found.items() if name.startswith("lora_te") and "up" in name)
    plain = ("--mixed_precision", precision, *FEATURES)
    assert train(*plain, "--output_name", "plain") == 0
    assert 0 < distance(weights(tmp_path, "plain"), found) < 1.5


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Of each part that is loaded, the types of its packed weights."""
    seen: dict[str, set[str]] = {}
    load = Components.load

    def watched(self: Components, name: str, *args: object, **kwargs: object) -> torch.nn.Module:
        module = load(self, name, *args, **kwargs)  # type: ignore[arg-type]
        seen[name] = {type(weight).__name__ for weight in module.parameters() if isinstance(weight, PackedWeight)}
        return module

    monkeypatch.setattr(Components, "load", watched)
    return seen


def test_the_text_encoder_can_have_another_format(train: Train, loaded: dict[str, set[str]]) -> None:
    assert train("--base_format", "nf4", "--text_encoder_format", "int8", "--max_train_steps", "1") == 0
    assert loaded == {"denoiser": {"NF4"}, "text_encoder": {"Scaled"}, "vae": set()}


def test_captions_are_encoded_for_a_cache_in_a_format_that_is_named(
    train: Train, loaded: dict[str, set[str]], tmp_path: Path
) -> None:
    """--base_format alone does not round what is cached; caches of several formats on disk lie beside each other."""
    cached = ("--network_train_unet_only", "--cache_text_encoder_outputs_to_disk", "--max_train_steps", "1")
    assert train(*cached, "--base_format", "nf4", "--output_name", "whole") == 0
    assert loaded["text_encoder"] == set()
    assert train(*cached, "--base_format", "nf4", "--text_encoder_format", "int8", "--output_name", "packed") == 0
    assert loaded["text_encoder"] == {"Scaled"}
    assert distance(weights(tmp_path, "whole"), weights(tmp_path, "packed")) > 0
    del loaded["text_encoder"]
    assert train(*cached, "--base_format", "nf4", "--text_encoder_format", "int8", "--output_name", "again") == 0
    assert "text_encoder" not in loaded
    assert same(weights(tmp_path, "again"), weights(tmp_path, "packed"))


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_base_weights_are_merged_before_the_weights_are_packed(train: Train, tmp_path: Path, format: str) -> None:
    """The same as if they were in the file of the base already."""
    words = ("--max_train_steps", "2")
    assert train("--output_name", "style", "--learning_rate", "1e-2", *words) == 0
    style = tmp_path / "out" / "style.safetensors"
    merged = tmp_path / "merged"
    _merged_base(merged, style)
    assert train("--output_name", "while", "--base_weights", str(style), "--base_format", format, *words) == 0
    before = ("--pretrained_model_name_or_path", str(merged), "--base_format", format)
    assert train("--output_name", "before", *before, *words) == 0
    assert same(weights(tmp_path, "while"), weights(tmp_path, "before"))
    assert train("--output_name", "without", "--base_format", format, *words) == 0
    assert not same(weights(tmp_path, "while"), weights(tmp_path, "without"))


def _merged_base(folder: Path, style: Path) -> None:
    """The tiny base in bf16 with a LoRA in it."""
    import shutil

    from library.models.opening import open_family
    from networks.merge import BaseWeights

    shutil.copytree(BASE, folder)
    family = open_family(str(BASE))
    names = {"denoiser": "unet", "text_encoder": "text_encoder"}
    for name in names:
        family.components.load(name, torch.bfloat16, "cpu")
    merge_into(BaseWeights([str(style)], []), family.adapter_targets())
    for name, part in names.items():
        family.components[name].save_pretrained(folder / part)


@pytest.mark.parametrize("format", ["fp8_scaled", "nf4"])
def test_a_weight_that_is_no_number_is_refused_with_its_layer(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    (file,) = (base / "unet").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("attn1.to_q.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    assert train("--pretrained_model_name_or_path", str(base), "--base_format", format) == 2
    said = capsys.readouterr().err
    assert f"--base_format {format}: lora_unet {name.removesuffix('.weight')} has NaN or infinite weights" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "fp8"])
@pytest.mark.slow
def test_networks_of_other_packages_train_on_a_packed_base(train: Train, tmp_path: Path, format: str) -> None:
    """As on a base that was rounded before."""
    pytest.importorskip("lycoris.kohya")
    words = ("--network_module", "lycoris.kohya", "--network_args", "algo=lora", "preset=attn-mlp", "--seed", "3")
    assert train(*words, "--base_format", format, "--output_name", "own") == 0
    rounded = tmp_path / "rounded"
    _rounded_base(rounded, format)
    assert train(*words, "--pretrained_model_name_or_path", str(rounded), "--output_name", "rounded") == 0
    assert distance(weights(tmp_path, "own"), weights(tmp_path, "rounded")) < 1e-3


def _rounded_base(folder: Path, format: str) -> None:
    import shutil

    from library.models.opening import open_family
    from library.quantization.frozen import Held, decoded

    shutil.copytree(BASE, folder)
    family = open_family(str(BASE))
    for name, part in {"denoiser": "unet", "text_encoder": "text_encoder"}.items():
        module = family.components.load(name, torch.float32, "cpu", held=Held(format, "--base_format"))
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.weight = torch.nn.Parameter(decoded(layer.weight, torch.float32), requires_grad=False)
        module.save_pretrained(folder / part)
