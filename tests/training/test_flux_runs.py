"""The main job with FLUX.1, through the real command line: image folder in, LoRA file out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import tiny_flux
from tests.quick import slow
from tests.training.written import ROUNDED, check_files, distance, metadata, same, weights

Train = Callable[..., int]
SHORT = ("--t5xxl_max_token_length", "16")
CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs")


@pytest.fixture
def train_flux(train: Train, tiny_flux: Path) -> Train:
    """As `train`, with the tiny FLUX.1."""
    return lambda *words: train("--pretrained_model_name_or_path", str(tiny_flux), *SHORT, *words)


def test_it_trains_validates_samples_and_saves(train_flux: Train, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("emoji of cat --w 72 --h 64 --s 2 --d 5 --g 2\nemoji of dog --w 64 --h 64\n", encoding="utf-8")
    words = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--validation_split", "0.3", "--report")
    assert train_flux(*words, "--timestep_sampling", "flux_shift", "--compare_prompts", "a cat") == 0
    facts = metadata(tmp_path)
    assert (facts["ss_base_model_version"], facts["modelspec.architecture"]) == ("flux1", "flux-1-dev/lora")
    assert facts["modelspec.implementation"] == "https://github.com/black-forest-labs/flux"
    assert (facts["ss_guidance_scale"], facts["ss_timestep_sampling"]) == ("1.0", "flux_shift")
    assert (facts["ss_discrete_flow_shift"], facts["ss_model_prediction_type"]) == ("3.0", "raw")
    found = weights(tmp_path)
    counts = {
        part: len({key.partition(".")[0] for key in found if key.startswith(part)})
        for part in ("lora_unet", "lora_te1")
    }
    assert counts == {"lora_unet": 10 * tiny_flux.DOUBLES + 3 * tiny_flux.SINGLES, "lora_te1": 12}
    (first, *_) = sorted((tmp_path / "out" / "sample").glob("*_00_*.png"))
    assert np.asarray(Image.open(first)).shape == (64, 64, 3)  # 72 is no multiple of 16
    for name in ("test-report.html", "test-compare.png", "test-best.safetensors"):
        assert (tmp_path / "out" / name).is_file(), name


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(train_flux: Train, tmp_path: Path) -> None:
    common = ("--network_dropout", "0.1", "--timestep_sampling", "shift", "--gradient_checkpointing")
    assert train_flux(*common, "--output_name", "whole") == 0
    assert train_flux(*common, "--output_name", "part", "--save_every_n_steps", "2", "--save_state") == 0
    state = tmp_path / "out" / "part-step00000002-state"
    assert train_flux(*common, "--output_name", "part", "--overwrite", "--resume", str(state)) == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "part"))


@pytest.mark.slow
def test_what_is_cached_changes_nothing(train_flux: Train, tmp_path: Path) -> None:
    common = ("--network_train_unet_only", "--max_train_steps", "2", "--apply_t5_attn_mask")
    disk = ("--cache_text_encoder_outputs_to_disk", "--cache_latents_to_disk")
    caches = {"memory": CACHED, "disk": disk, "again": disk, "fresh": ("--no-cache_latents",)}
    for name, words in caches.items():
        assert train_flux(*common, "--output_name", name, *words) == 0
    found = {name: weights(tmp_path, name) for name in caches}
    assert same(found["disk"], found["again"])
    for other in ("disk", "fresh"):
        assert distance(found[other], found["memory"]) < ROUNDED
    (entry, *_) = (tmp_path / "data" / "2_style" / ".lora_cache" / "texts").glob("*.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(entry).items()}
    assert shapes == {"hidden_states": (16, 32), "mask": (16,), "pooled": (64,)}


@pytest.mark.slow
def test_kohyas_command_line(train: Train, tiny_flux: Path, tmp_path: Path) -> None:
    """As 16 of 27 published configurations have it, with files of their own and kohya's name of the module."""
    from flux_train_network import main
    from tests.tiny_flux import single_files

    files = single_files(tiny_flux, tmp_path / "files", dtype=torch.bfloat16)
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    words += ["--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64"]
    words += ["--output_dir", str(tmp_path / "out"), "--output_name", "test", "--seed", "1", "--max_train_steps", "2"]
    words += ["--network_module", "networks.lora_flux", "--network_dim", "16", "--network_alpha", "16"]
    words += ["--timestep_sampling", "shift", "--discrete_flow_shift", "3.1582", "--model_prediction_type", "raw"]
    words += ["--guidance_scale", "1.0", "--mixed_precision", "bf16", "--save_precision", "bf16", "--fp8_base"]
    words += ["--cache_text_encoder_outputs", "--cache_latents", "--network_train_unet_only", "--sdpa"]
    words += ["--gradient_checkpointing", "--optimizer_type", "adafactor", "--learning_rate", "1e-3", *SHORT]
    assert main(words) == 0
    found = weights(tmp_path)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert metadata(tmp_path)["ss_network_module"] == "networks.lora_flux"


@pytest.mark.parametrize(
    "words",
    [
        ("--train_batch_size", "3", "--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "16"),
        ("--mixed_precision", "bf16", "--full_bf16", *CACHED),
        ("--mixed_precision", "fp16", *CACHED),
        ("--base_format", "nf4", *CACHED),
        slow((("--base_format", "int8"),)),
        ("--blocks_to_swap", "4", *CACHED),
        slow((("--timestep_sampling", "sigmoid", "--ip_noise_gamma", "0.1", "--loss_type", "huber"),)),
        ("--weighting_scheme", "logit_normal", "--min_timestep", "100", "--max_timestep", "900"),
        slow((("--network_args", "train_blocks=double"),)),
        ("--network_args", "block_dims=2,4,2,4,8"),
        slow((("--lr_layer_decay", "0.5"),)),
        ("--save_naming", "diffusers"),
        slow((("--dry_run", "--gpu_memory", "24GB"),)),
        ("--fit", "24GB"),
        slow((("--recommend",),)),
        pytest.param(("--find_lr", "--find_lr_steps", "20"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_settings_work(train_flux: Train, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert train_flux("--max_train_steps", "2", *words) == 0
    check_files(tmp_path)


@pytest.mark.parametrize(("section", "other"), [("double", "single"), ("single", "double")])
def test_one_kind_of_blocks_alone(train_flux: Train, tmp_path: Path, section: str, other: str) -> None:
    assert (
        train_flux("--network_train_unet_only", "--max_train_steps", "1", "--network_args", f"train_blocks={section}")
        == 0
    )
    found = weights(tmp_path)
    assert any(key.startswith(f"lora_unet_{section}_blocks") for key in found)
    assert not any(key.startswith(f"lora_unet_{other}_blocks") for key in found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--min_snr_gamma", "5"), "--min_snr_gamma: .* is trained by flow matching"),
        (("--debiased_estimation_loss",), "--debiased_estimation_loss: .* is trained by flow matching"),
        (("--v_pred_like_loss", "1"), "--v_pred_like_loss: .* is trained by flow matching"),
        (("--noise_offset", "0.05"), "--noise_offset: .* is a FLUX.1 model: its samples begin with plain noise"),
        (("--multires_noise_iterations", "6"), "--multires_noise_iterations: .* is a FLUX.1 model"),
        (("--zero_terminal_snr",), "is a FLUX.1 model; the option is for a Stable Diffusion"),
        (("--v_parameterization",), "is a FLUX.1 model; the option is for a Stable Diffusion"),
        (("--clip_skip", "2"), "is a FLUX.1 model; the option is for a Stable Diffusion"),
        (("--model_prediction_type", "sigma_scaled"), "sigma_scaled changes the prediction .* raw is right"),
        (("--network_args", "split_qkv=True"), "split_qkv is known .*adapters of their own in any case"),
        (("--network_args", "train_blocks=doubel"), "train_blocks: 'doubel': this model's are double, single, or all"),
        (("--discrete_flow_shift", "0"), "--discrete_flow_shift must be above 0"),
        (("--split_mode",), "--split_mode.*here: --blocks_to_swap"),
        (("--token_string", "sks"), "--token_string: embeddings of a FLUX.1 model are not supported here yet"),
    ],
)
def test_what_has_no_meaning_is_refused(
    train_flux: Train, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert train_flux(*words) == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--guidance_scale", "1.5"), "the option is for a FLUX.1 model"),
        (("--clip_l", "clip_l.safetensors"), "the option is for a FLUX.1 model"),
        (
            ("--timestep_sampling", "flux_shift"),
            "--timestep_sampling flux_shift: .* for which there are sigma, uniform",
        ),
    ],
)
def test_its_options_are_refused_for_others(
    train: Train, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert train(*words) == 2
    assert re.search(said, capsys.readouterr().err)


def test_what_guis_write_for_every_model_is_no_mistake(train: Train) -> None:
    words = ("--discrete_flow_shift", "3.1582", "--guidance_scale", "3.5", "--model_prediction_type", "raw")
    assert train(*words, "--max_train_steps", "1") == 0


def test_kohyas_guidance_is_warned_of(train_flux: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_flux("--guidance_scale", "3.5", "--max_train_steps", "1", *CACHED) == 0
    said = capsys.readouterr().err
    assert "--guidance_scale 3.5: the LoRA learns what the model does when it is told so much; 1 is usual" in said
