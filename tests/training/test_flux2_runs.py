"""The main job with FLUX.2 klein, through the real command line: image folder in, LoRA file out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tiny_flux2 import DOUBLES, LAYERS, SINGLES, STATES, WIDTH, single_files
from tests.training.written import ROUNDED, check_files, distance, metadata, same, weights

Train = Callable[..., int]
TOKENS = 64
SHORT_TEXTS = ("--qwen3_max_token_length", str(TOKENS))
CACHED = (*SHORT_TEXTS, "--network_train_unet_only", "--cache_text_encoder_outputs")
IN_KOHYAS_FILES = 8 * DOUBLES + 2 * SINGLES


@pytest.fixture
def train_klein(train: Train, tiny_flux2: Path) -> Train:
    """As `train`, with the tiny FLUX.2 klein."""
    return lambda *words: train("--pretrained_model_name_or_path", str(tiny_flux2), *words)


def test_it_trains_validates_samples_and_saves(train_klein: Train, tmp_path: Path, capsys) -> None:
    """Without --network_train_unet_only, which is what it does in any case."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("emoji of cat --w 72 --h 64 --s 2 --d 5\nemoji of dog --w 64 --h 64 --s 2\n", encoding="utf-8")
    words = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--validation_split", "0.3", "--report")
    assert train_klein(*words, *SHORT_TEXTS) == 0
    facts = metadata(tmp_path)
    assert (facts["ss_base_model_version"], facts["modelspec.architecture"]) == ("flux_2_klein", "Flux.2-klein/lora")
    assert facts["modelspec.implementation"] == "https://github.com/black-forest-labs/flux2"
    assert (facts["ss_timestep_sampling"], facts["ss_discrete_flow_shift"]) == ("flux2_shift", "3.0")
    found = weights(tmp_path)
    layers = {key.partition(".")[0] for key in found}
    assert len(layers) == IN_KOHYAS_FILES
    assert layers > {"lora_unet_double_blocks_0_txt_attn_qkv", "lora_unet_single_blocks_1_linear2"}
    said = capsys.readouterr().err
    assert f"{IN_KOHYAS_FILES} of {IN_KOHYAS_FILES} layers load, as trained, in ComfyUI, diffusers" in said
    (first, *_) = sorted((tmp_path / "out" / "sample").glob("*_00_*.png"))
    assert np.asarray(Image.open(first)).shape == (64, 64, 3)  # 72 is no multiple of 16
    for name in ("test-report.html", "test-best.safetensors"):
        assert (tmp_path / "out" / name).is_file(), name


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(train_klein: Train, tmp_path: Path) -> None:
    common = (*SHORT_TEXTS, "--network_dropout", "0.1", "--gradient_checkpointing")
    common += ("--max_train_steps", "2", "--ema_decay", "0.9")
    assert train_klein(*common, "--output_name", "whole") == 0
    assert train_klein(*common, "--output_name", "part", "--save_every_n_steps", "1", "--save_state") == 0
    state = tmp_path / "out" / "part-step00000001-state"
    assert train_klein(*common, "--output_name", "part", "--overwrite", "--resume", str(state)) == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "part"))


@pytest.mark.slow
def test_what_is_cached_changes_nothing(train_klein: Train, tmp_path: Path) -> None:
    """Texts of one length, with their padding."""
    common = ("--max_train_steps", "2")
    disk = (
        *SHORT_TEXTS,
        "--network_train_unet_only",
        "--cache_text_encoder_outputs_to_disk",
        "--cache_latents_to_disk",
    )
    caches = {"memory": CACHED, "disk": disk, "again": disk, "fresh": ("--no-cache_latents", *SHORT_TEXTS)}
    for name, words in caches.items():
        assert train_klein(*common, "--output_name", name, *words) == 0
    found = {name: weights(tmp_path, name) for name in caches}
    assert same(found["disk"], found["again"])
    for other in ("disk", "fresh"):
        assert distance(found[other], found["memory"]) < ROUNDED
    (entry, *_) = (tmp_path / "data" / "2_style" / ".lora_cache" / "texts").glob("*.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(entry).items()}
    assert shapes == {"hidden_states": (TOKENS, 3 * STATES)}


@pytest.mark.slow
def test_musubis_command_line(tiny_flux2: Path, image_folder: Path, tmp_path: Path) -> None:
    """With files of their own and musubi-tuner's names of the module, the version and the levels."""
    from flux2_train_network import main

    files = single_files(tiny_flux2, tmp_path / "files")
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    words += ["--train_data_dir", str(image_folder), "--caption_extension", ".txt", "--resolution", "64"]
    words += ["--output_dir", str(tmp_path / "out"), "--output_name", "test", "--seed", "1", "--max_train_steps", "2"]
    words += ["--network_module", "networks.lora_flux_2", "--network_dim", "32", "--network_alpha", "32", "--sdpa"]
    words += ["--timestep_sampling", "flux2_shift", "--weighting_scheme", "none"]
    words += ["--model_version", "klein-base-4b", "--gradient_checkpointing", *CACHED, "--cache_latents"]
    assert main([*words, "--optimizer_type", "adafactor", "--learning_rate", "1e-3"]) == 0
    assert len(weights(tmp_path)) == 3 * IN_KOHYAS_FILES
    assert metadata(tmp_path)["ss_network_module"] == "networks.lora_flux_2"


def test_diffusers_names(train_klein: Train, tmp_path: Path, capsys) -> None:
    """If they are asked for: each layer with its own pair."""
    assert train_klein(*CACHED, "--save_naming", "diffusers", "--max_train_steps", "1") == 0
    found = weights(tmp_path)
    assert len(found) == 2 * LAYERS
    assert found.keys() > {"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight"}
    assert f"{LAYERS} of {LAYERS} layers load, as trained, in ComfyUI, diffusers" in capsys.readouterr().err


# -- a distilled base


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A file that changes the base a lot."""
    generator, tensors = torch.Generator().manual_seed(2), {}
    for block in range(DOUBLES):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            place = f"transformer.transformer_blocks.{block}.attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(4, WIDTH, generator=generator) * 0.2
            tensors[f"{place}.lora_B.weight"] = torch.randn(WIDTH, 4, generator=generator) * 0.2
    save_file(tensors, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@pytest.mark.slow
def test_a_training_adapter_acts_in_training_and_not_in_samples(
    train_klein: Train, adapter: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Samples before the first step are the base's own, to the bit; the LoRA is another than without the adapter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("emoji of cat --w 64 --h 64 --s 2 --d 5\n", encoding="utf-8")
    common = (*CACHED, "--max_train_steps", "2", "--model_version", "klein-4b")
    common += ("--sample_prompts", "prompts.txt", "--sample_at_first")
    said, pixels = {}, {}
    for name, words in {"alone": (), "apart": ("--base_weights", str(adapter))}.items():
        assert train_klein(*common, "--output_name", name, *words) == 0
        said[name] = capsys.readouterr().err
        (path,) = (tmp_path / "out" / "sample").glob(f"{name}_e000000_00_*")
        pixels[name] = np.asarray(Image.open(path))
    assert np.array_equal(pixels["apart"], pixels["alone"])
    assert distance(weights(tmp_path, "apart"), weights(tmp_path, "alone")) > 100 * ROUNDED
    assert "is distilled to a few steps: training unlearns them, unless --base_weights" in said["alone"]
    assert "unlearns" not in said["apart"]
    assert "adapter.safetensors" in metadata(tmp_path, "apart")["ss_training_adapters"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--train_batch_size", "3", "--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "16"),
        ("--base_format", "int8", *CACHED),
        ("--base_format", "fp8_scaled", *CACHED),
        ("--base_format", "nf4", *CACHED),
        ("--fp8_base", "--mixed_precision", "bf16", *CACHED),
        ("--text_encoder_format", "int8"),
        ("--blocks_to_swap", "3", "--gradient_checkpointing", *CACHED),
        ("--timestep_sampling", "sigmoid", "--ip_noise_gamma", "0.1", "--loss_type", "huber"),
        ("--timestep_sampling", "shift", "--discrete_flow_shift", "2.5"),
        ("--weighting_scheme", "logit_normal", "--min_timestep", "100", "--max_timestep", "900"),
        ("--network_module", "networks.lokr"),
        ("--network_module", "networks.dora", "--network_args", "wd_on_output=True", "--save_naming", "diffusers"),
        ("--network_args", "block_dims=2,4,2,1"),
        ("--lr_layer_decay", "0.5"),
        ("--network_args", "preset=attn-only"),
        ("--network_args", "preset=attn-qv"),
        ("--full_bf16", "--mixed_precision", "bf16", *CACHED),
        ("--dry_run", "--gpu_memory", "24GB"),
        ("--fit", "24GB"),
        ("--recommend",),
        ("--find_lr", "--find_lr_steps", "20"),
    ],
    ids=" ".join,
)
def test_settings_work(train_klein: Train, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert train_klein("--max_train_steps", "2", *SHORT_TEXTS, *words) == 0
    check_files(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--min_snr_gamma", "5"), "--min_snr_gamma: .* is trained by flow matching"),
        (("--noise_offset", "0.05"), "--noise_offset: .* is a FLUX.2 klein model: its samples begin with plain noise"),
        (("--clip_skip", "2"), "is a FLUX.2 klein model; the option is for a Stable Diffusion"),
        (("--t5xxl", "t5.safetensors"), "is a FLUX.2 klein model; the option is for a FLUX.1 model"),
        (("--guidance_scale", "2"), "is a FLUX.2 klein model; the option is for a FLUX.1 model"),
        (("--turbo",), "is a FLUX.2 klein model; the option is for a Z-Image model"),
        (("--timestep_sampling", "flux_shift"), "--timestep_sampling flux_shift: .* for which there are sigma, unif"),
        (("--network_train_text_encoder_only",), "only: the text encoder of a FLUX.2 klein model is not trained"),
        (("--model_version", "dev"), "--model_version.*FLUX.2 dev is not supported: 32 billion"),
        (("--dit", "a.safetensors"), "--dit.*here: --pretrained_model_name_or_path"),
        (("--text_encoder", "a.safetensors"), "--text_encoder.*here: --qwen3"),
        (("--fp8_text_encoder",), "--fp8_text_encoder.*here: --text_encoder_format fp8"),
        (("--token_string", "sks"), "--token_string: embeddings of a FLUX.2 klein model are not supported here yet"),
    ],
)
def test_what_has_no_meaning_is_refused(
    train_klein: Train, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert train_klein(*words) == 2
    assert re.search(said, capsys.readouterr().err)


def test_its_options_are_refused_for_others(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--model_version", "klein-4b") == 2
    assert "the option is for a FLUX.2 klein model" in capsys.readouterr().err
