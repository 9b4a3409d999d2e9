"""The main job with Anima, through the real command line: image folder in, LoRA file out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.tiny_anima import BLOCKS, STATES, TEXT_LAYERS
from tests.training.written import ROUNDED, check_files, distance, metadata, same, weights

Train = Callable[..., int]
CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs")
BUCKETS = ("--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "16")


@pytest.fixture
def train_anima(train: Train, tiny_anima: Path) -> Train:
    """As `train`, with the tiny Anima."""
    return lambda *words: train("--pretrained_model_name_or_path", str(tiny_anima), *words)


def test_it_trains_validates_samples_and_saves(train_anima: Train, tmp_path: Path, capsys) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("emoji of cat --w 72 --h 64 --s 2 --d 5\nemoji of dog --w 64 --h 64 --s 2\n", encoding="utf-8")
    words = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--validation_split", "0.3", "--report")
    assert train_anima(*words) == 0
    facts = metadata(tmp_path)
    assert (facts["ss_base_model_version"], facts["modelspec.architecture"]) == ("anima", "anima-preview/lora")
    assert (facts["ss_timestep_sampling"], facts["ss_discrete_flow_shift"]) == ("sigmoid", "1.0")
    found = weights(tmp_path)
    layers = {key.rpartition(".lora_")[0] for key in found}
    text = [name for name in layers if name.startswith("text_encoders.qwen3_06b.transformer.model.layers.")]
    unet = [name for name in layers if name.startswith("diffusion_model.blocks.")]
    assert (len(unet), len(text), len(layers)) == (10 * BLOCKS, 7 * TEXT_LAYERS, 44)
    assert {key.rpartition(".lora_")[2] for key in found} == {"A.weight", "B.weight"}
    said = capsys.readouterr().err
    assert "test.safetensors: 44 of 44 layers load, as trained, in ComfyUI" in said
    assert re.search(r"diffusers: 30 of 44 layers load \(14 layers: it adapts the transformer alone\)", said)
    (first, *_) = sorted((tmp_path / "out" / "sample").glob("*_00_*.png"))
    assert np.asarray(Image.open(first)).shape == (64, 64, 3)  # 72 is no multiple of 16
    for name in ("test-report.html", "test-best.safetensors"):
        assert (tmp_path / "out" / name).is_file(), name


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(train_anima: Train, tmp_path: Path) -> None:
    common = ("--network_dropout", "0.1", "--timestep_sampling", "shift", "--gradient_checkpointing")
    common = (*common, "--max_train_steps", "2")
    assert train_anima(*common, "--output_name", "whole") == 0
    assert train_anima(*common, "--output_name", "part", "--save_every_n_steps", "1", "--save_state") == 0
    state = tmp_path / "out" / "part-step00000001-state"
    assert train_anima(*common, "--output_name", "part", "--overwrite", "--resume", str(state)) == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "part"))


def test_a_cached_text_is_one_that_is_encoded_in_each_step(train_anima: Train, tmp_path: Path) -> None:
    """The longest captions of a batch differ, and so does the number of states that are cached."""
    common = ("--network_train_unet_only", "--max_train_steps", "2", "--save_naming", "kohya")
    for name, words in {"cached": CACHED, "fresh": ()}.items():
        assert train_anima(*common, "--output_name", name, *words) == 0
    assert distance(weights(tmp_path, "cached"), weights(tmp_path, "fresh")) < ROUNDED


@pytest.mark.slow
def test_what_is_cached_changes_nothing(train_anima: Train, tmp_path: Path) -> None:
    common = ("--network_train_unet_only", "--max_train_steps", "2", "--save_naming", "kohya")
    disk = ("--cache_text_encoder_outputs_to_disk", "--cache_latents_to_disk")
    caches = {"memory": CACHED, "disk": disk, "again": disk, "fresh": ("--no-cache_latents",)}
    for name, words in caches.items():
        assert train_anima(*common, "--output_name", name, *words) == 0
    found = {name: weights(tmp_path, name) for name in caches}
    assert same(found["disk"], found["again"])
    for other in ("disk", "fresh"):
        assert distance(found[other], found["memory"]) < ROUNDED
    (entry, *_) = (tmp_path / "data" / "2_style" / ".lora_cache" / "texts").glob("*.safetensors")
    ((name, tensor),) = load_file(entry).items()
    assert name == "hidden_states"
    assert tensor.shape[0] < 64  # as many as tokens, and not 512
    assert tensor.shape[1] == STATES


@pytest.mark.slow
def test_kohyas_command_line(train: Train, tiny_anima: Path, tmp_path: Path) -> None:
    """With files of their own and kohya's name of the module; its names of the layers, if they are asked for."""
    from anima_train_network import main
    from tests.tiny_anima import single_files

    files = single_files(tiny_anima, tmp_path / "files")
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    words += ["--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64"]
    words += ["--output_dir", str(tmp_path / "out"), "--output_name", "test", "--seed", "1", "--max_train_steps", "2"]
    words += ["--network_module", "networks.lora_anima", "--network_dim", "16", "--network_alpha", "16"]
    words += ["--timestep_sampling", "sigma", "--discrete_flow_shift", "1.0", "--attn_mode", "torch", "--sdpa"]
    words += ["--cache_text_encoder_outputs", "--cache_latents", "--network_train_unet_only", "--vae_chunk_size", "64"]
    words += ["--qwen3_max_token_length", "512", "--gradient_checkpointing", "--save_naming", "kohya"]
    words += ["--optimizer_type", "adafactor", "--learning_rate", "1e-3", "--save_precision", "bf16"]
    assert main(words) == 0
    found = weights(tmp_path)
    assert {key.partition(".")[0] for key in found} > {"lora_unet_blocks_0_self_attn_q_proj"}
    assert len(found) == 3 * 10 * BLOCKS
    assert all(tensor.isfinite().all() for tensor in found.values())
    facts = metadata(tmp_path)
    assert facts["ss_network_module"] == "networks.lora_anima"
    assert "ss_timestep_sampling" not in facts, "uniform levels have none, as in kohya's"


@pytest.mark.slow
def test_either_naming_is_trained_on(train_anima: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step of rate 0 leaves what was read: the same weights, whichever names they had."""
    assert train_anima(*CACHED, "--output_name", "dotted", "--max_train_steps", "1") == 0
    given = ("--network_weights", str(tmp_path / "out" / "dotted.safetensors"), "--dim_from_weights")
    nothing = ("--learning_rate", "1e-30", "--max_train_steps", "1", "--optimizer_type", "SGD")
    assert train_anima(*CACHED, *given, *nothing, "--save_naming", "kohya", "--output_name", "flat") == 0
    again = ("--network_weights", str(tmp_path / "out" / "flat.safetensors"), "--dim_from_weights")
    assert train_anima(*CACHED, *again, *nothing, "--output_name", "back") == 0
    assert same(weights(tmp_path, "dotted"), weights(tmp_path, "back"))
    assert all(key.startswith("lora_unet_blocks_") for key in weights(tmp_path, "flat"))


def test_other_kinds_have_kohyas_names(train_anima: Train, tmp_path: Path) -> None:
    """No other program than ComfyUI reads them, and it reads these."""
    assert train_anima(*CACHED, "--network_module", "networks.lokr", "--max_train_steps", "1") == 0
    found = weights(tmp_path)
    assert all(key.startswith("lora_unet_blocks_") for key in found)
    assert any("lokr_w1" in key for key in found)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--train_batch_size", "3", *BUCKETS), marks=pytest.mark.slow),
        pytest.param(("--base_format", "int8", *CACHED), marks=pytest.mark.slow),
        pytest.param(("--base_format", "fp8", "--mixed_precision", "bf16", *CACHED), marks=pytest.mark.slow),
        pytest.param(("--mixed_precision", "fp16"), marks=pytest.mark.slow),
        pytest.param(("--base_format", "nf4", *CACHED), marks=pytest.mark.slow),
        pytest.param(("--blocks_to_swap", "3", "--gradient_checkpointing", *CACHED), marks=pytest.mark.slow),
        pytest.param(
            ("--timestep_sampling", "sigmoid", "--ip_noise_gamma", "0.1", "--loss_type", "huber"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--weighting_scheme", "logit_normal", "--min_timestep", "100", "--max_timestep", "900"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("--network_args", "block_dims=2,4,2"), marks=pytest.mark.slow),
        pytest.param(("--lr_layer_decay", "0.5"), marks=pytest.mark.slow),
        pytest.param(("--network_args", "preset=full"), marks=pytest.mark.slow),
        pytest.param(("--dry_run", "--gpu_memory", "24GB"), marks=pytest.mark.slow),
        pytest.param(("--fit", "24GB"), marks=pytest.mark.slow),
        pytest.param(("--recommend",), marks=pytest.mark.slow),
        pytest.param(("--find_lr", "--find_lr_steps", "20"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_settings_work(train_anima: Train, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert train_anima("--max_train_steps", "2", *words) == 0
    check_files(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--min_snr_gamma", "5"), "--min_snr_gamma: .* is trained by flow matching"),
        (("--noise_offset", "0.05"), "--noise_offset: .* is an Anima model: its samples begin with plain noise"),
        (("--zero_terminal_snr",), "is an Anima model; the option is for a Stable Diffusion"),
        (("--clip_skip", "2"), "is an Anima model; the option is for a Stable Diffusion"),
        (("--t5xxl", "t5.safetensors"), "is an Anima model; the option is for a FLUX.1 model"),
        (("--guidance_scale", "1.5"), "is an Anima model; the option is for a FLUX.1 model"),
        (
            ("--timestep_sampling", "flux_shift"),
            "--timestep_sampling flux_shift: .* for which there are sigma, uniform",
        ),
        (
            ("--network_args", "train_llm_adapter=True"),
            "train_llm_adapter is known .*Anima's LLM adapter is not trained",
        ),
        (("--self_attn_lr", "1e-4"), "--self_attn_lr.*here: network_reg_lrs"),
        (("--token_string", "sks"), "--token_string: embeddings of an Anima model are not supported here yet"),
    ],
)
def test_what_has_no_meaning_is_refused(
    train_anima: Train, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert train_anima(*words) == 2
    assert re.search(said, capsys.readouterr().err)


def test_its_options_are_refused_for_others(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--qwen3", "qwen3.safetensors") == 2
    assert "the option is for an Anima model" in capsys.readouterr().err
