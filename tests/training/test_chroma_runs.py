"""The main job with Chroma, through the real command line: image folder in, LoRA file out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import tiny_chroma
from tests.quick import slow
from tests.training.written import ROUNDED, check_files, distance, metadata, same, weights

Train = Callable[..., int]
CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs")


@pytest.fixture
def train_chroma(train: Train, tiny_chroma: Path) -> Train:
    """As `train`, with the tiny Chroma."""
    return lambda *words: train("--pretrained_model_name_or_path", str(tiny_chroma), *words)


def test_it_trains_validates_samples_and_saves(train_chroma: Train, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    lines = ("emoji of cat --n a dog --w 72 --h 64 --s 2 --d 5", "emoji of dog --w 64 --h 64 --s 2 --l 1")
    prompts.write_text("\n".join(lines), encoding="utf-8")
    words = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--validation_split", "0.3", "--report")
    assert train_chroma(*words, "--timestep_sampling", "sigmoid", "--compare_prompts", "a cat") == 0
    facts = metadata(tmp_path)
    assert (facts["ss_base_model_version"], facts["modelspec.architecture"]) == ("chroma", "chroma/lora")
    assert facts["modelspec.implementation"] == "https://huggingface.co/lodestones/Chroma"
    assert (facts["ss_guidance_scale"], facts["ss_timestep_sampling"]) == ("0.0", "sigmoid")
    assert (facts["ss_model_type"], facts["ss_apply_t5_attn_mask"]) == ("chroma", "True")
    modules = {key.partition(".")[0] for key in weights(tmp_path)}
    assert len(modules) == 8 * tiny_chroma.DOUBLES + 2 * tiny_chroma.SINGLES
    (first, *_) = sorted((tmp_path / "out" / "sample").glob("*_00_*.png"))
    assert np.asarray(Image.open(first)).shape == (64, 64, 3)  # 72 is no multiple of 16
    for name in ("test-report.html", "test-compare.png", "test-best.safetensors"):
        assert (tmp_path / "out" / name).is_file(), name


@pytest.mark.slow  # FLUX.1's is quick
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(train_chroma: Train, tmp_path: Path) -> None:
    common = ("--network_dropout", "0.1", "--timestep_sampling", "shift", "--gradient_checkpointing")
    assert train_chroma(*common, "--output_name", "whole") == 0
    assert train_chroma(*common, "--output_name", "part", "--save_every_n_steps", "2", "--save_state") == 0
    state = tmp_path / "out" / "part-step00000002-state"
    assert train_chroma(*common, "--output_name", "part", "--overwrite", "--resume", str(state)) == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "part"))


@pytest.mark.slow
def test_what_is_cached_changes_nothing(train_chroma: Train, tmp_path: Path) -> None:
    """Nor does recomputing activations; with captions of unequal lengths in a batch."""
    disk = ("--network_train_unet_only", "--cache_text_encoder_outputs_to_disk", "--cache_latents_to_disk")
    ways = {"memory": CACHED, "disk": disk, "again": disk, "fresh": ("--no-cache_latents",)}
    ways["checkpoints"] = ("--gradient_checkpointing", *CACHED)
    for caption, text in zip(sorted((tmp_path / "data" / "2_style").glob("*.txt")), "aabbcc", strict=True):
        caption.write_text(text * (1 + 5 * ord(text) % 17), encoding="utf-8")
    for name, words in ways.items():
        assert train_chroma("--max_train_steps", "2", "--output_name", name, *words) == 0
    found = {name: weights(tmp_path, name) for name in ways}
    assert same(found["disk"], found["again"])
    for other in ("disk", "fresh", "checkpoints"):
        assert distance(found[other], found["memory"]) < ROUNDED, other
    entries = list((tmp_path / "data" / "2_style" / ".lora_cache" / "texts").glob("*.safetensors"))
    assert all(load_file(entry).keys() == {"hidden_states", "mask"} for entry in entries)
    assert max(len(load_file(entry)["mask"]) for entry in entries) < 32, "without the padding of 512 tokens"


@pytest.mark.parametrize("dtype", [slow(torch.bfloat16), torch.float32], ids=str)
def test_kohyas_command_line(train: Train, tiny_chroma: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """As kohya's documents have it, with files of their own."""
    from flux_train_network import main
    from tests.tiny_chroma import single_files

    files = single_files(tiny_chroma, tmp_path / "files", dtype=dtype)
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    words += ["--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64"]
    words += ["--output_dir", str(tmp_path / "out"), "--output_name", "test", "--seed", "1", "--max_train_steps", "2"]
    words += ["--network_module", "networks.lora_flux", "--network_dim", "16", "--network_alpha", "16"]
    words += ["--model_type", "chroma", "--apply_t5_attn_mask", "--guidance_scale", "0.0"]
    words += ["--timestep_sampling", "sigmoid", "--model_prediction_type", "raw"]
    if dtype == torch.bfloat16:
        words += ["--mixed_precision", "bf16", "--fp8_base"]
    words += ["--cache_text_encoder_outputs", "--cache_latents", "--network_train_unet_only", "--sdpa"]
    words += ["--save_precision", "bf16", "--gradient_checkpointing", "--learning_rate", "1e-3"]
    assert main(words) == 0
    found = weights(tmp_path)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert metadata(tmp_path)["ss_network_module"] == "networks.lora_flux"


@pytest.mark.parametrize(
    "words",
    [
        ("--train_batch_size", "3", "--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "16"),
        slow((("--mixed_precision", "bf16", "--full_bf16", *CACHED),)),
        slow((("--mixed_precision", "fp16", *CACHED),)),
        slow((("--base_format", "nf4", *CACHED),)),
        ("--blocks_to_swap", "4", "--gradient_checkpointing", *CACHED),
        slow((("--gradient_checkpointing", "--cpu_offload_checkpointing", *CACHED),)),
        slow((("--timestep_sampling", "flux_shift", "--ip_noise_gamma", "0.1", "--loss_type", "huber"),)),
        slow((("--network_args", "train_blocks=double"),)),
        ("--network_args", "block_dims=2,4,2,4,8"),
        slow((("--save_naming", "diffusers"),)),
        slow((("--dry_run", "--gpu_memory", "24GB"),)),
        ("--fit", "24GB"),
        slow((("--recommend",),)),
        slow((("--find_lr", "--find_lr_steps", "20"),)),
    ],
    ids=" ".join,
)
def test_settings_work(train_chroma: Train, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert train_chroma("--max_train_steps", "2", *words) == 0
    check_files(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model_type", "flux"), "--model_type: 'flux' is wrong: .* is a Chroma model, 'chroma'"),
        (("--clip_l", "clip_l.safetensors"), "--clip_l: .* is a Chroma model; the option is for a FLUX.1 model"),
        (("--min_snr_gamma", "5"), "--min_snr_gamma: .* is trained by flow matching"),
        (("--noise_offset", "0.05"), "--noise_offset: .* is a Chroma model: its samples begin with plain noise"),
        (("--network_train_text_encoder_only",), "the text encoder of a Chroma model is not trained"),
        (("--network_args", "train_blocks=doubel"), "train_blocks: 'doubel': this model's are double, single, or all"),
        (("--token_string", "sks"), "--token_string: embeddings of a Chroma model are not supported here yet"),
    ],
)
def test_what_has_no_meaning_is_refused(
    train_chroma: Train, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert train_chroma(*words) == 2
    assert re.search(said, capsys.readouterr().err)


def test_its_options_are_refused_for_others(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--model_type", "chroma") == 2
    assert "--model_type: " in capsys.readouterr().err


def test_what_has_no_effect_is_said(train_chroma: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_chroma("--guidance_scale", "3.5", "--max_train_steps", "1", *CACHED) == 0
    said = capsys.readouterr().err
    assert "--guidance_scale has no effect: Chroma is told no guidance" in said
    assert "T5's padding is hidden without --apply_t5_attn_mask, too" in said
