"""The main job with Stable Diffusion 3, through the real command line: image folder in, LoRA file out."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import tiny_sd3 as tiny
from tests.quick import slow
from tests.training.written import ROUNDED, check_files, distance, metadata, same, weights

Train = Callable[..., int]
SHORT = ("--t5xxl_max_token_length", "16")
CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs")


@pytest.fixture
def train_sd3(train: Train, tiny_sd3: Path) -> Train:
    """As `train`, with the tiny Stable Diffusion 3.5 medium."""
    return lambda *words: train("--pretrained_model_name_or_path", str(tiny_sd3), *SHORT, *words)


def test_it_trains_validates_samples_and_saves(
    train_sd3: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("emoji of cat --w 72 --h 64 --s 2 --d 5 --l 2\n", encoding="utf-8")
    words = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--validation_split", "0.3")
    drawn = ("--weighting_scheme", "logit_normal", "--training_shift", "2")
    assert train_sd3(*words, *drawn, "--max_train_steps", "2") == 0
    facts = metadata(tmp_path)
    assert (facts["ss_base_model_version"], facts["modelspec.architecture"]) == (
        "5-medium",
        "stable-diffusion-3-5-medium/lora",
    )
    assert facts["modelspec.implementation"] == "https://github.com/Stability-AI/sd3.5"
    assert (facts["ss_weighting_scheme"], facts["ss_training_shift"]) == ("logit_normal", "2.0")
    assert (facts["ss_apply_lg_attn_mask"], facts["ss_apply_t5_attn_mask"]) == ("False", "False")
    found = weights(tmp_path)
    counts = {
        part: len({key.partition(".")[0] for key in found if key.startswith(part)})
        for part in ("lora_unet", "lora_te1", "lora_te2")
    }
    assert counts == {"lora_unet": (tiny.BLOCKS - 1) * 10 + 7 + 4, "lora_te1": 12, "lora_te2": 12}
    (first, *_) = sorted((tmp_path / "out" / "sample").glob("*_00_*.png"))
    assert np.asarray(Image.open(first)).shape == (64, 64, 3)  # 72 is no multiple of 16
    assert (tmp_path / "out" / "test-best.safetensors").is_file()
    said = capsys.readouterr().err
    assert re.search(r"diffusers: none of \d+ layers load \(it wants names that begin with transformer\.", said)


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(train_sd3: Train, tmp_path: Path) -> None:
    """Also of what the encoders are left out of."""
    rates = [word for name in ("clip_l", "clip_g", "t5") for word in (f"--{name}_dropout_rate", "0.4")]
    common = (*rates, "--network_dropout", "0.1", "--gradient_checkpointing", *CACHED)
    assert train_sd3(*common, "--output_name", "whole") == 0
    assert train_sd3(*common, "--output_name", "part", "--save_every_n_steps", "2", "--save_state") == 0
    state = tmp_path / "out" / "part-step00000002-state"
    assert train_sd3(*common, "--output_name", "part", "--overwrite", "--resume", str(state)) == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "part"))
    assert train_sd3("--network_dropout", "0.1", *CACHED, "--output_name", "plain") == 0
    assert distance(weights(tmp_path, "plain"), weights(tmp_path, "whole")) > 0.05
    assert metadata(tmp_path, "whole")["ss_t5_dropout_rate"] == "0.4"


@pytest.mark.slow
def test_what_is_cached_changes_nothing(train_sd3: Train, tmp_path: Path) -> None:
    common = (
        "--network_train_unet_only",
        "--max_train_steps",
        "2",
        "--apply_t5_attn_mask",
        "--clip_l_dropout_rate",
        "0.3",
    )
    disk = ("--cache_text_encoder_outputs_to_disk", "--cache_latents_to_disk")
    caches = {"memory": CACHED, "disk": disk, "again": disk, "fresh": ("--no-cache_latents",)}
    for name, words in caches.items():
        assert train_sd3(*common, "--output_name", name, *words) == 0
    found = {name: weights(tmp_path, name) for name in caches}
    assert same(found["disk"], found["again"])
    for other in ("disk", "fresh"):
        assert distance(found[other], found["memory"]) < ROUNDED
    (entry, *_) = (tmp_path / "data" / "2_style" / ".lora_cache" / "texts").glob("*.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(entry).items()}
    assert shapes == {"clip": (77, 192), "pooled": (192,), "t5": (16, 256)}


@pytest.mark.slow
def test_without_t5_it_trains_and_caches(train: Train, tiny_sd3: Path, tmp_path: Path) -> None:
    """Nor is its tokenizer needed; a dry run knows its parts."""
    no_t5 = shutil.ignore_patterns("text_encoder_3", "tokenizer_3")
    small = Path(shutil.copytree(tiny_sd3, tmp_path / "small", ignore=no_t5))
    words = ("--pretrained_model_name_or_path", str(small), *SHORT, "--max_train_steps", "2")
    for name, more in {"cached": CACHED, "trained": (), "fit": ("--fit", "24GB")}.items():
        assert train(*words, *more, "--output_name", name) == 0
    assert train(*words, "--dry_run", "--gpu_memory", "24GB") == 0
    assert any(key.startswith("lora_te2") for key in weights(tmp_path, "trained"))


@pytest.mark.slow
def test_kohyas_command_line(train: Train, tiny_sd3: Path, tmp_path: Path) -> None:
    """With files of their own and kohya's name of the module."""
    from sd3_train_network import main

    files = tiny.single_files(tiny_sd3, tmp_path / "files", dtype=torch.bfloat16)
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    words += ["--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64"]
    words += ["--output_dir", str(tmp_path / "out"), "--output_name", "test", "--seed", "1", "--max_train_steps", "2"]
    words += ["--network_module", "networks.lora_sd3", "--network_dim", "16", "--network_alpha", "16", "--network_args"]
    words += ["loraplus_unet_lr_ratio=4", "context_mod_dim=0", "x_mod_dim=0", "train_block_indices=0-2"]
    words += ["--weighting_scheme", "uniform", "--training_shift", "1.0", "--mixed_precision", "bf16"]
    words += ["--save_precision", "bf16", "--fp8_base", "--cache_text_encoder_outputs", "--cache_latents", "--sdpa"]
    words += ["--network_train_unet_only", "--gradient_checkpointing", "--optimizer_type", "adafactor"]
    assert main([*words, "--learning_rate", "1e-3", "--bucket_reso_steps", "32", *SHORT]) == 0
    found = weights(tmp_path)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert not any("adaLN" in key for key in found)
    assert metadata(tmp_path)["ss_network_module"] == "networks.lora_sd3"


@pytest.mark.parametrize(
    "words",
    [
        slow((("--train_batch_size", "3", "--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "16"),)),
        slow((("--mixed_precision", "bf16", "--full_bf16", *CACHED),)),
        slow((("--mixed_precision", "fp16", *CACHED),)),
        slow((("--base_format", "nf4", *CACHED),)),
        slow((("--base_format", "int8"),)),
        slow((("--blocks_to_swap", "3", *CACHED),)),
        slow((("--timestep_sampling", "sigmoid", "--ip_noise_gamma", "0.1", "--loss_type", "huber"),)),
        slow((("--weighting_scheme", "mode", "--min_timestep", "100", "--max_timestep", "900"),)),
        slow((("--apply_lg_attn_mask", "--apply_t5_attn_mask", "--text_encoder_lr", "1e-4", "2e-4"),)),
        slow((("--network_args", "block_dims=2,4,8"),)),
        slow((("--lr_layer_decay", "0.5"),)),
        slow((("--save_naming", "diffusers"),)),
        slow((("--dry_run", "--gpu_memory", "24GB"),)),
        slow((("--fit", "24GB"),)),
        slow((("--recommend",),)),
        slow((("--find_lr", "--find_lr_steps", "20"),)),
    ],
    ids=" ".join,
)
def test_settings_work(train_sd3: Train, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert train_sd3("--max_train_steps", "2", *words) == 0
    check_files(tmp_path)


def test_kohyas_network_args(train_sd3: Train, tmp_path: Path) -> None:
    """Ranks by kind of layer, blocks, and embedders, under kohya's names."""
    words = ("context_attn_dim=0", "context_mod_dim=0", "x_attn_dim=3", "x_mlp_dim=5", "train_block_indices=0,2")
    more = ("emb_dims=[0,2,4,0,0,6]", "split_qkv=False", "verbose=True")
    arguments = ("--network_module", "networks.lora_sd3", "--network_args", *words, *more)
    assert train_sd3("--network_train_unet_only", "--max_train_steps", "1", "--network_dim", "7", *arguments) == 0
    ranks = {
        key.removesuffix(".lora_down.weight").removeprefix("lora_unet_"): len(tensor)
        for key, tensor in weights(tmp_path).items()
        if key.endswith("lora_down.weight")
    }
    expected = {"t_embedder_mlp_0": 2, "t_embedder_mlp_2": 2, "x_embedder_proj": 4, "final_layer_linear": 6}
    for i in (0, 2):
        block = f"joint_blocks_{i}"
        # in files query, key and value are one layer, of the sum of their ranks
        expected |= {f"{block}_x_block_attn_qkv": 9, f"{block}_x_block_attn_proj": 3}
        expected |= {f"{block}_x_block_mlp_fc1": 5, f"{block}_x_block_mlp_fc2": 5}
        expected |= {f"{block}_x_block_adaLN_modulation_1": 7}
    expected |= {"joint_blocks_0_x_block_attn2_qkv": 9, "joint_blocks_0_x_block_attn2_proj": 3}
    expected |= {"joint_blocks_0_context_block_mlp_fc1": 7, "joint_blocks_0_context_block_mlp_fc2": 7}
    assert ranks == expected


SD3 = ("--network_module", "networks.lora_sd3", "--network_args")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--min_snr_gamma", "5"), "--min_snr_gamma: .* is trained by flow matching"),
        (("--noise_offset", "0.05"), "--noise_offset: .* is a Stable Diffusion 3 model: its samples begin with plain"),
        (("--zero_terminal_snr",), "is a Stable Diffusion 3 model; the option is for a Stable Diffusion"),
        (("--clip_skip", "2"), "is a Stable Diffusion 3 model; the option is for a Stable Diffusion"),
        (("--discrete_flow_shift", "2"), "is a Stable Diffusion 3 model; the option is for a FLUX.1 model"),
        (
            ("--timestep_sampling", "shift"),
            "--timestep_sampling shift: .*there are sigma, uniform, sigmoid; --training_s",
        ),
        (("--pos_emb_random_crop_rate", "0.5"), "pos_emb_random_crop_rate.*table of places is cropped at its centre"),
        (("--enable_scaled_pos_embed",), "enable_scaled_pos_embed.*table of places is cropped at its centre"),
        (("--clip_l_dropout_rate", "1.5"), "--clip_l_dropout_rate: must be at most 1, not 1.5"),
        ((*SD3, "split_qkv=True"), "split_qkv is known .*adapters of their own in any case"),
        ((*SD3, "train_t5xxl=True"), "train_t5xxl is known .*T5 is not trained"),
        ((*SD3, "emb_dims=1,2"), "emb_dims=1,2: 2 numbers, and there are 6 layers"),
        ((*SD3, "x_attn_dim=four"), "x_attn_dim=four: four is no rank"),
        ((*SD3, "x_attn_dim=4", "preset=full"), "preset and kohya's ranks by kind of layer each choose"),
        ((*SD3, "train_block_indices=0-3"), "train_block_indices: '0-3': .* from 0 to 2 are this model's blocks"),
        (("--network_args", "x_attn_dim=4"), "x_attn_dim"),
        (("--resolution", "160"), "has places for 128 pixels a side, and an image's bucket has 160 × 160"),
        (
            ("--token_string", "sks"),
            "--token_string: embeddings of a Stable Diffusion 3 model are not supported here yet",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(
    train_sd3: Train, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert train_sd3(*words) == 2
    assert re.search(said, capsys.readouterr().err)


def test_too_large_a_sample_is_refused(train_sd3: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("emoji of cat --w 64 --h 192\n", encoding="utf-8")
    assert train_sd3("--sample_prompts", str(prompts), "--sample_every_n_steps", "2") == 2
    assert "has places for 128 pixels a side, and a sample has 64 × 192" in capsys.readouterr().err


def test_its_options_are_refused_for_others(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("--clip_g", "clip_g.safetensors"), ("--t5_dropout_rate", "0.1"), ("--apply_lg_attn_mask",)):
        assert train(*words) == 2
        assert "the option is for a Stable Diffusion 3 model" in capsys.readouterr().err


def test_what_guis_write_for_every_model_is_no_mistake(train: Train, tmp_path: Path) -> None:
    """Rates of 0, masks that are off, empty names of files."""
    config = tmp_path / "gui.toml"
    config.write_text(
        "clip_l_dropout_rate = 0\nclip_g_dropout_rate = 0.0\nt5_dropout_rate = 0\napply_lg_attn_mask = false\n"
        'apply_t5_attn_mask = false\nclip_l = ""\nclip_g = ""\nt5xxl = ""\n',
        encoding="utf-8",
    )
    assert train("--config_file", str(config), "--max_train_steps", "1") == 0


@pytest.mark.slow
def test_a_turbo_is_told_by_its_name(train: Train, tiny_sd3: Path, tmp_path: Path, capsys) -> None:
    named = shutil.copytree(tiny_sd3, tmp_path / "sd3.5_large_turbo")
    assert train("--pretrained_model_name_or_path", str(named), *SHORT, "--max_train_steps", "1", *CACHED) == 0
    assert "distilled to a few steps" in capsys.readouterr().err
