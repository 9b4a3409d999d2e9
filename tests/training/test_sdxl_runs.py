"""The main job with SDXL, through the real command line: image folder in, LoRA file out, that diffusers draws with."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.models.components import Components
from library.models.opening import open_family
from library.models.stable_diffusion_xl import StableDiffusionXL
from library.quantization import FORMATS
from library.quantization.frozen import Held, decoded
from tests.conftest import BASE, ROOT
from tests.quick import quick, slow
from tests.tiny_sdxl import TEXTS
from tests.training.written import ROUNDED, distance, same, weights

CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs")


@pytest.fixture
def train_sdxl(train: Callable[..., int], tiny_sdxl: Path) -> Callable[..., int]:
    """As `train`, with the tiny SDXL."""
    return lambda *words: train("--pretrained_model_name_or_path", str(tiny_sdxl), *words)


def test_a_lora_comes_out_that_is_kohyas(train_sdxl, tmp_path):
    assert train_sdxl("--clip_skip", "2", "--text_encoder_lr", "1e-3", "5e-4") == 0
    tensors = weights(tmp_path)
    modules = {key.partition(".")[0] for key in tensors}
    counts = {part: sum(name.startswith(part) for name in modules) for part in ("lora_unet", "lora_te1", "lora_te2")}
    assert counts == {"lora_unet": 192, "lora_te1": 18, "lora_te2": 18}
    still = {key.partition(".")[0] for key, t in tensors.items() if key.endswith("lora_up.weight") and not t.any()}
    # the first encoder's last layer is not read, so nothing can teach it; kohya's files hold it as well
    assert len(still) == 6
    assert all(name.startswith("lora_te1_text_model_encoder_layers_2_") for name in still)
    with safe_open(tmp_path / "out" / "test.safetensors", framework="pt") as file:
        facts = file.metadata()
    assert facts["ss_base_model_version"] == "sdxl_base_v1-0"
    assert facts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert facts["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert (facts["ss_v2"], facts["ss_clip_skip"], facts["modelspec.prediction_type"]) == ("False", "None", "epsilon")
    assert facts["ss_text_encoder_lr"] == "[0.001, 0.0005]"
    assert facts["modelspec.resolution"] == "64x64"


@pytest.mark.slow
def test_what_is_cached_changes_nothing(train_sdxl, tmp_path):
    common = ("--network_train_unet_only", "--max_train_steps", "2", "--max_token_length", "150")
    disk = ("--cache_text_encoder_outputs_to_disk", "--cache_latents_to_disk")
    caches = {"memory": CACHED, "disk": disk, "again": disk, "fresh": ("--no-cache_latents",)}
    for name, words in caches.items():
        assert train_sdxl(*common, "--output_name", name, *words) == 0
    found = {name: weights(tmp_path, name) for name in caches}
    assert same(found["disk"], found["again"])
    for other in ("disk", "fresh"):
        assert distance(found[other], found["memory"]) < ROUNDED
    (entry, *_) = (tmp_path / "data" / "2_style" / ".lora_cache" / "texts").glob("*.safetensors")
    assert {name: tuple(t.shape) for name, t in load_file(entry).items()} == {
        "hidden_states": (152, 72),
        "pooled": (24,),
    }


def test_a_cached_text_cannot_learn(train_sdxl, capsys):
    assert train_sdxl("--cache_text_encoder_outputs") == 2
    assert "--cache_text_encoder_outputs needs --network_train_unet_only" in capsys.readouterr().err


def test_the_unet_is_told_the_true_sizes(train_sdxl, image_folder, monkeypatch):
    """Of 170 × 100 pixels, resized to 109 × 64, the middle 64 begin at 22, and seen mirrored at 23."""
    paths = sorted((image_folder / "2_style").glob("*.png"))
    for path in paths[2:]:
        path.unlink()
    for path, size in zip(paths[:2], ((64, 200), (170, 100)), strict=True):
        Image.new("RGB", size, "red").save(path)
    seen = set()
    predict = StableDiffusionXL.predict

    def watched(self, noisy, t, condition):
        seen.update(tuple(row) for row in condition["time_ids"].tolist())
        return predict(self, noisy, t, condition)

    monkeypatch.setattr(StableDiffusionXL, "predict", watched)
    assert train_sdxl("--max_train_epochs", "2", "--flip_aug", *CACHED) == 0
    # original height and width, top, left, height and width of the cut
    assert seen == {(200, 64, 68, 0, 64, 64), (100, 170, 0, 22, 64, 64), (100, 170, 0, 23, 64, 64)}


@pytest.mark.parametrize(
    "words",
    [
        slow((("--validation_split", "0.34", "--ema_decay", "0.9"),)),
        slow((("--mixed_precision", "bf16", "--full_bf16", *CACHED, "--gradient_checkpointing"),)),
        slow((("--mixed_precision", "bf16", "--gradient_checkpointing"),)),
        ("--network_args", "conv_dim=2", "block_dims=" + ",".join(["0"] * 10 + ["2"] * 13), "down_lr_weight=linear"),
        slow(
            (
                (
                    *("--optimizer_type", "CustomAdamW", "--use_orthogonal_grad", "--optim_bits", "32"),
                    *("--max_grad_norm", "0.5"),
                ),
            )
        ),
        ("--network_train_text_encoder_only", "--weighted_captions"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_settings_train(train_sdxl, tmp_path, words):
    assert train_sdxl(*words, "--max_train_steps", "2") == 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.slow
@pytest.mark.parametrize("cached", [(), CACHED])
@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_base_acts_as_one_that_was_rounded_before(train_sdxl, tiny_sdxl, tmp_path, cached, format):
    """Of all layers that can be adapted; where captions are cached, they are encoded before."""
    rounded = Path(shutil.copytree(tiny_sdxl, tmp_path / "rounded"))
    family = open_family(str(tiny_sdxl))
    for name in ("denoiser", *(() if cached else TEXTS)):
        module = family.components.load(name, torch.bfloat16, "cpu", held=Held(format, "--base_format"))
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.weight = torch.nn.Parameter(decoded(layer.weight, torch.bfloat16), requires_grad=False)
        module.save_pretrained(rounded / family.PARTS[name].folder)

    common = ("--mixed_precision", "bf16", "--gradient_checkpointing", *cached)
    assert train_sdxl(*common, "--output_name", "own", "--base_format", format) == 0
    assert train_sdxl(*common, "--output_name", "rounded", "--pretrained_model_name_or_path", str(rounded)) == 0
    # another path of a gradient may round a bf16 to its neighbour, 0.4 % away; without rounded weights it is 40 %
    assert distance(weights(tmp_path, "own"), weights(tmp_path, "rounded")) < 0.05
    with safe_open(tmp_path / "out" / "own.safetensors", framework="pt") as file:
        is_fp8 = str(format == "fp8")
        assert (file.metadata()["ss_fp8_base"], file.metadata()["ss_fp8_base_unet"]) == (is_fp8, "False")


@pytest.mark.slow
def test_kohyas_option_is_the_format_fp8(train_sdxl, tmp_path):
    common = ("--mixed_precision", "bf16", "--max_train_steps", "2")
    assert train_sdxl(*common, "--output_name", "kohyas", "--fp8_base") == 0
    assert train_sdxl(*common, "--output_name", "ours", "--base_format", "fp8") == 0
    assert same(weights(tmp_path, "kohyas"), weights(tmp_path, "ours"))
    assert train_sdxl(*common, "--output_name", "unet", "--fp8_base_unet") == 0
    words = ("--base_format", "fp8", "--text_encoder_format", "none")
    assert train_sdxl(*common, "--output_name", "ours_unet", *words) == 0
    assert same(weights(tmp_path, "unet"), weights(tmp_path, "ours_unet"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--fp8_base",), "--fp8_base needs --mixed_precision bf16 or fp16"),
        (("--base_format", "fp8"), "--base_format fp8 needs --mixed_precision bf16 or fp16"),
        (("--text_encoder_format", "fp8"), "--text_encoder_format fp8 needs --mixed_precision bf16 or fp16"),
        (
            ("--fp8_base", "--mixed_precision", "bf16", "--network_module", "lycoris.kohya"),
            "--network_module lycoris.kohya: it comp",
        ),
        (("--fp8_base", "--base_format", "nf4"), "--fp8_base is --base_format fp8, and --base_format nf4 is given"),
        (("--fp8_base_unet", "--base_format", "none"), "--fp8_base_unet is --base_format fp8, and --base_format none"),
        (
            ("--fp8_base_unet", "--text_encoder_format", "nf4"),
            "--fp8_base_unet leaves the text encoders as they are, and --text_encoder_format nf4",
        ),
    ],
)
def test_what_cannot_be_in_fewer_bits(train_sdxl, capsys, words, said):
    assert train_sdxl(*words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--fp8_base",), ("--base_format", "fp8_scaled"), ("--text_encoder_format", "fp8")])
def test_apples_gpus_have_no_eight_bits(train_sdxl, capsys, monkeypatch, words):
    monkeypatch.setattr("accelerate.Accelerator.device", torch.device("mps"))
    assert train_sdxl(*words, "--mixed_precision", "bf16") == 2
    assert f"{' '.join(words)}: Apple's GPUs have no 8-bit floats" in capsys.readouterr().err


@pytest.mark.parametrize("preset", quick(["sdxl_style", "sdxl_character", "sdxl_concept"], "sdxl_style"))
def test_presets_train(train_sdxl, tmp_path, preset):
    words = ("--preset", preset, "--no-enable_bucket", "--max_train_steps", "1")
    assert train_sdxl(*words) == 0
    assert len(weights(tmp_path)) == 3 * (192 if preset == "sdxl_style" else 228)


@pytest.mark.parametrize("half", [True, False])
def test_a_vae_that_overflows_in_fp16_computes_in_fp32(train_sdxl, capsys, half):
    dtypes = []
    load = Components.load

    def watched(self, name, dtype, device, **more):
        if name == "vae":
            dtypes.append(dtype)
        return load(self, name, dtype, device, **more)

    words = ["--mixed_precision", "fp16", *CACHED, "--max_train_steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Components, "load", watched)
        assert train_sdxl(*words, *([] if half else ["--no_half_vae"])) == 0
    assert dtypes == [torch.float32]
    assert ("(--no_half_vae)" in capsys.readouterr().err) == half


def test_latents_that_are_no_numbers_stop_the_run(train_sdxl, tmp_path, monkeypatch, capsys):
    def overflow(self, pixels):
        latents = torch.full((len(pixels), 4, 8, 8), float("nan"))
        return latents, latents

    monkeypatch.setattr(StableDiffusionXL, "encode_images", overflow)
    for words in (["--no-cache_latents"], []):
        assert train_sdxl(*words, "--overwrite") == 2
        error = capsys.readouterr().err
        assert "--no_half_vae" in error
        assert ".png" in error
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_samples_and_comparisons_are_drawn(train_sdxl, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "emoji of cat --w 64 --h 64 --s 2 --d 5\nemoji of dog --n cat --w 96 --h 64 --s 2 --ss euler_a\n"
    )
    common = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--max_train_steps", "2")
    compare = ("--compare_prompts", "emoji of cat", "--compare_steps", "2")
    assert train_sdxl(*common, *CACHED, *compare, "--mixed_precision", "bf16") == 0
    assert train_sdxl(*common, "--output_name", "both", "--max_token_length", "150", "--mixed_precision", "bf16") == 0
    pictures = sorted((tmp_path / "out" / "sample").glob("*_000002_*.png"))
    assert [np.asarray(Image.open(path)).shape[:2] for path in pictures] == [(64, 64), (64, 96)] * 2
    assert (tmp_path / "out" / "test-compare.png").exists()


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(train_sdxl, tmp_path):
    common = ("--network_dropout", "0.1", "--flip_aug")
    assert train_sdxl(*common, "--output_name", "whole") == 0
    assert train_sdxl(*common, "--output_name", "part", "--save_every_n_steps", "2", "--save_state") == 0
    state = tmp_path / "out" / "part-step00000002-state"
    assert train_sdxl(*common, "--output_name", "part", "--overwrite", "--resume", str(state)) == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "part"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--network_args", "block_dims=" + ",".join(["4"] * 25)), "block_dims: 25 numbers for this model's 23 blocks"),
        (("--network_args", "conv_block_alphas=4,4"), "conv_block_alphas: 2 numbers for this model's 23 blocks"),
        (("--text_encoder_lr", "1e-4", "1e-5", "1e-6"), "--text_encoder_lr: 3 rates for 2 text encoders"),
    ],
)
def test_what_does_not_fit_the_family_is_told_before_images_are_encoded(train_sdxl, capsys, monkeypatch, words, said):
    monkeypatch.setattr(Components, "load", None)
    assert train_sdxl(*words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_names_the_format_and_counts_its_bits(train_sdxl, capsys):
    def weights_in_bits(said, *words):
        assert train_sdxl("--dry_run", "--mixed_precision", "bf16", *CACHED, *words) == 0
        out = capsys.readouterr().out
        assert (f"frozen weights in {said}" in out) == bool(words)
        number, unit = re.search(r"a training step: weights ([\d.]+) ([KM])iB", out).groups()
        return float(number) * {"K": 1, "M": 1024}[unit]

    whole = weights_in_bits("")
    assert weights_in_bits("fp8", "--fp8_base_unet") < 0.75 * whole
    assert weights_in_bits("nf4", "--base_format", "nf4") < 0.7 * whole


@pytest.mark.slow
def test_a_dry_run_tells_what_it_takes(train_sdxl, capsys):
    assert train_sdxl("--dry_run") == 0
    said = capsys.readouterr().out
    assert "(sdxl_base_v1-0, epsilon)" in said
    assert "text_encoder_1 18 modules, text_encoder_2 18 modules, unet 192 modules" in said
    assert " a training step: weights " in said


def test_the_command_for_sdxl_takes_nothing_else(tiny_sdxl, tmp_path, image_folder, capsys):
    from sdxl_train_network import main

    words = ["--train_data_dir", str(image_folder), "--caption_extension", ".txt", "--resolution", "64"]
    words += ["--output_dir", str(tmp_path / "out"), "--max_train_steps", "1", "--max_data_loader_n_workers", "0"]
    words += ["--no-loss_plot"]
    assert main([*words, "--pretrained_model_name_or_path", str(BASE)]) == 2
    assert f"{BASE} is a Stable Diffusion 1.x or 2.x model, where an SDXL model is expected" in capsys.readouterr().err
    assert main([*words, "--pretrained_model_name_or_path", str(tiny_sdxl)]) == 0
    assert (tmp_path / "out" / "last.safetensors").exists()


def test_the_commands_are_installed():
    import importlib

    import toml

    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for name, target in project["project"]["scripts"].items():
        module, _, function = target.partition(":")
        if "." not in module:
            assert module in project["tool"]["setuptools"]["py-modules"]
            assert name == module.replace("_", "-")
        assert callable(getattr(importlib.import_module(module), function))
