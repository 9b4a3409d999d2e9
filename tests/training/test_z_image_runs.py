"""The main job with Z-Image, through the real command line: image folder in, LoRA file out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.files.hashes import sha256
from library.record import run_file
from tests.tiny_z_image import LAYERS, STATES, WIDTH, single_files
from tests.training.written import ROUNDED, check_files, distance, metadata, same, weights

Train = Callable[..., int]
CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs")


@pytest.fixture
def train_z_image(train: Train, tiny_z_image: Path) -> Train:
    """As `train`, with the tiny Z-Image."""
    return lambda *words: train("--pretrained_model_name_or_path", str(tiny_z_image), *words)


def test_it_trains_validates_samples_and_saves(train_z_image: Train, tmp_path: Path, capsys) -> None:
    """Without --network_train_unet_only, which is what it does in any case."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("emoji of cat --w 72 --h 64 --s 2 --d 5\nemoji of dog --w 64 --h 64 --s 2\n", encoding="utf-8")
    words = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--validation_split", "0.3", "--report")
    assert train_z_image(*words) == 0
    facts = metadata(tmp_path)
    assert (facts["ss_base_model_version"], facts["modelspec.architecture"]) == ("z_image", "Z-Image/lora")
    assert facts["modelspec.implementation"] == "https://github.com/Tongyi-MAI/Z-Image"
    assert (facts["ss_timestep_sampling"], facts["ss_discrete_flow_shift"]) == ("shift", "2.0")
    found = weights(tmp_path)
    layers = {key.rpartition(".lora_")[0] for key in found}
    assert len(layers) == 7 * LAYERS
    assert all(name.startswith("diffusion_model.layers.") for name in layers)
    assert {key.rpartition(".lora_")[2] for key in found} == {"A.weight", "B.weight"}
    said = capsys.readouterr().err
    assert f"{7 * LAYERS} of {7 * LAYERS} layers load, as trained, in ComfyUI, diffusers" in said
    (first, *_) = sorted((tmp_path / "out" / "sample").glob("*_00_*.png"))
    assert np.asarray(Image.open(first)).shape == (64, 64, 3)  # 72 is no multiple of 16
    for name in ("test-report.html", "test-best.safetensors"):
        assert (tmp_path / "out" / name).is_file(), name


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(train_z_image: Train, tmp_path: Path) -> None:
    common = ("--network_dropout", "0.1", "--gradient_checkpointing", "--max_train_steps", "2", "--ema_decay", "0.9")
    assert train_z_image(*common, "--output_name", "whole") == 0
    assert train_z_image(*common, "--output_name", "part", "--save_every_n_steps", "1", "--save_state") == 0
    state = tmp_path / "out" / "part-step00000001-state"
    assert train_z_image(*common, "--output_name", "part", "--overwrite", "--resume", str(state)) == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "part"))


@pytest.mark.slow
def test_what_is_cached_changes_nothing(train_z_image: Train, tmp_path: Path) -> None:
    """Texts of several lengths."""
    common = ("--max_train_steps", "2", "--save_naming", "kohya")
    disk = ("--network_train_unet_only", "--cache_text_encoder_outputs_to_disk", "--cache_latents_to_disk")
    caches = {"memory": CACHED, "disk": disk, "again": disk, "fresh": ("--no-cache_latents",)}
    for name, words in caches.items():
        assert train_z_image(*common, "--output_name", name, *words) == 0
    found = {name: weights(tmp_path, name) for name in caches}
    assert same(found["disk"], found["again"])
    for other in ("disk", "fresh"):
        assert distance(found[other], found["memory"]) < ROUNDED
    (entry, *_) = (tmp_path / "data" / "2_style" / ".lora_cache" / "texts").glob("*.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(entry).items()}
    length = shapes["mask"][0]
    assert shapes == {"hidden_states": (length, STATES), "mask": (length,)}
    assert length < 128  # as many as tokens, and not 512


@pytest.mark.slow
def test_musubis_command_line(tiny_z_image: Path, image_folder: Path, tmp_path: Path) -> None:
    """With files of their own and musubi-tuner's name of the module; its names of the layers, if they are asked for."""
    from zimage_train_network import main

    files = single_files(tiny_z_image, tmp_path / "files")
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    words += ["--train_data_dir", str(image_folder), "--caption_extension", ".txt", "--resolution", "64"]
    words += ["--output_dir", str(tmp_path / "out"), "--output_name", "test", "--seed", "1", "--max_train_steps", "2"]
    words += ["--network_module", "networks.lora_zimage", "--network_dim", "16", "--network_alpha", "16", "--sdpa"]
    words += ["--timestep_sampling", "shift", "--weighting_scheme", "none", "--discrete_flow_shift", "2.0"]
    words += ["--gradient_checkpointing", "--save_naming", "kohya", *CACHED, "--cache_latents"]
    assert main([*words, "--optimizer_type", "adafactor", "--learning_rate", "1e-3"]) == 0
    found = weights(tmp_path)
    assert {key.partition(".")[0] for key in found} > {"lora_unet_layers_0_attention_to_q"}
    assert len(found) == 3 * 7 * LAYERS
    assert metadata(tmp_path)["ss_network_module"] == "networks.lora_zimage"


def test_other_kinds_have_dotted_names_too(train_z_image: Train, tmp_path: Path, capsys) -> None:
    """ComfyUI finds no attention layer of Z-Image under kohya's."""
    assert train_z_image(*CACHED, "--network_module", "networks.lokr", "--max_train_steps", "1") == 0
    found = weights(tmp_path)
    assert all(key.startswith("diffusion_model.layers.") for key in found)
    assert any("lokr_w1" in key for key in found)
    assert f"{7 * LAYERS} of {7 * LAYERS} layers load, as trained, in ComfyUI" in capsys.readouterr().err


# -- a distilled base


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A file that changes the base a lot."""
    generator, tensors = torch.Generator().manual_seed(2), {}
    for layer in range(LAYERS):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            place = f"diffusion_model.layers.{layer}.attention.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(4, WIDTH, generator=generator) * 0.2
            tensors[f"{place}.lora_B.weight"] = torch.randn(WIDTH, 4, generator=generator) * 0.2
    save_file(tensors, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def first_samples(tmp_path: Path) -> Callable[[str], np.ndarray]:
    """The pixels of a run's sample before the first step, by the run's name, with the words that render it."""
    (tmp_path / "prompts.txt").write_text("emoji of cat --w 64 --h 64 --s 2 --d 5\n", encoding="utf-8")

    def pixels(name: str) -> np.ndarray:
        (path,) = (tmp_path / "out" / "sample").glob(f"{name}_e000000_00_*")
        return np.asarray(Image.open(path))

    return pixels


SHORT = (*CACHED, "--max_train_steps", "2", "--save_naming", "kohya", "--turbo")
DRAWN = ("--sample_prompts", "prompts.txt", "--sample_at_first")


def test_a_training_adapter_acts_in_training_and_not_in_samples(
    train_z_image: Train, adapter: Path, tmp_path: Path, capsys, monkeypatch, first_samples
) -> None:
    """Samples before the first step are the base's own, to the bit; the LoRA is another than without the adapter."""
    monkeypatch.chdir(tmp_path)
    runs = {"alone": (), "apart": ("--base_weights", str(adapter), "--sample_every_n_steps", "1", "--report")}
    said = {}
    for name, words in runs.items():
        assert train_z_image(*SHORT, *DRAWN, "--output_name", name, *words) == 0
        said[name] = capsys.readouterr().err
    assert np.array_equal(first_samples("apart"), first_samples("alone"))
    assert distance(weights(tmp_path, "apart"), weights(tmp_path, "alone")) > 100 * ROUNDED
    assert "is distilled to a few steps: training unlearns them, unless --base_weights" in said["alone"]
    assert "unlearns" not in said["apart"]
    facts = metadata(tmp_path, "apart")
    assert "adapter.safetensors" in facts["ss_training_adapters"]
    assert "ss_base_weights" not in facts
    record = run_file.read(tmp_path / "out" / "apart-run.json")
    assert record is not None
    assert record.facts is not None
    (file,) = record.facts.model.base_weights
    assert (file.file, file.multiplier, file.sha256, file.apart) == (str(adapter), 1.0, sha256(adapter), True)
    assert f"in training alone: {adapter} × 1" in said["apart"]
    page = (tmp_path / "out" / "apart-report.html").read_text(encoding="utf-8")
    assert "trained with adapter.safetensors × 1, for use without it" in page


@pytest.mark.slow
def test_a_training_adapter_apart_is_one_that_is_merged(
    train_z_image: Train, adapter: Path, tmp_path: Path, monkeypatch, first_samples
) -> None:
    """But for the samples; and it makes no difference whether there are any."""
    monkeypatch.chdir(tmp_path)
    given = ("--base_weights", str(adapter))
    runs = {
        "apart": (*DRAWN, "--sample_every_n_steps", "1"),
        "unseen": (),
        "merged": (*DRAWN, "--no-base_weights_off_for_samples"),
    }
    for name, words in runs.items():
        assert train_z_image(*SHORT, *given, "--output_name", name, *words) == 0
    assert not np.array_equal(first_samples("merged"), first_samples("apart"))
    found = {name: weights(tmp_path, name) for name in runs}
    assert same(found["apart"], found["unseen"])
    assert distance(found["apart"], found["merged"]) < 10 * ROUNDED
    assert "adapter.safetensors" in metadata(tmp_path, "merged")["ss_base_weights"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--base_format", "nf4"),
        ("--base_format", "int8"),
        ("--network_module", "networks.dora"),
        ("--gradient_checkpointing", "--blocks_to_swap", "3"),
    ],
)
def test_a_training_adapter_goes_with(
    train_z_image: Train, adapter: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Formats of the base, kinds that look at its weights, swapped blocks."""
    given = ("--turbo", "--base_weights", str(adapter), "--max_train_steps", "2", "--compare_prompts", "a cat")
    assert train_z_image(*CACHED, *given, *words) == 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_a_training_adapter_is_refused_where_it_would_not_act(
    train_z_image: Train, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--turbo", "--base_weights", str(adapter), "--network_module", "lycoris.kohya")
    assert train_z_image(*CACHED, *given) == 2
    assert "modules of other packages do not see what is apart" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--train_batch_size", "3", "--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "16"),
        ("--base_format", "int8", *CACHED),
        ("--base_format", "fp8_scaled", *CACHED),
        ("--base_format", "nf4", *CACHED),
        ("--text_encoder_format", "int8"),
        ("--blocks_to_swap", "3", "--gradient_checkpointing", *CACHED),
        ("--timestep_sampling", "sigmoid", "--ip_noise_gamma", "0.1", "--loss_type", "huber"),
        ("--weighting_scheme", "logit_normal", "--min_timestep", "100", "--max_timestep", "900"),
        ("--network_args", "block_dims=2,4,2"),
        ("--lr_layer_decay", "0.5"),
        ("--network_args", "preset=full"),
        ("--network_args", "preset=attn-qv"),
        ("--dry_run", "--gpu_memory", "24GB"),
        ("--fit", "24GB"),
        ("--recommend",),
        ("--find_lr", "--find_lr_steps", "20"),
    ],
    ids=" ".join,
)
def test_settings_work(train_z_image: Train, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert train_z_image("--max_train_steps", "2", *words) == 0
    check_files(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--min_snr_gamma", "5"), "--min_snr_gamma: .* is trained by flow matching"),
        (("--noise_offset", "0.05"), "--noise_offset: .* is a Z-Image model: its samples begin with plain noise"),
        (("--clip_skip", "2"), "is a Z-Image model; the option is for a Stable Diffusion"),
        (("--t5xxl", "t5.safetensors"), "is a Z-Image model; the option is for a FLUX.1 model"),
        (("--llm_adapter_path", "a"), "is a Z-Image model; the option is for an Anima model"),
        (("--timestep_sampling", "flux_shift"), "--timestep_sampling flux_shift: .* for which there are sigma, unif"),
        (("--network_train_text_encoder_only",), "only: the text encoder of a Z-Image model is not trained"),
        (("--dit", "a.safetensors"), "--dit.*here: --pretrained_model_name_or_path"),
        (("--text_encoder", "a.safetensors"), "--text_encoder.*here: --qwen3"),
        (("--token_string", "sks"), "--token_string: embeddings of a Z-Image model are not supported here yet"),
    ],
)
def test_what_has_no_meaning_is_refused(
    train_z_image: Train, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert train_z_image(*words) == 2
    assert re.search(said, capsys.readouterr().err)


def test_its_options_are_refused_for_others(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--turbo") == 2
    assert "the option is for a Z-Image model" in capsys.readouterr().err
