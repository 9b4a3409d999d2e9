"""A family is one file and one line: a made-up one goes through the real command line, with all that a run can do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.models import FAMILIES
from library.models.opening import open_family
from networks.formats.fused import fuse, split
from networks.merge import BaseWeights
from networks.sites import Site
from tests import toy_family
from tests.merging import merge_into
from tests.quick import slow
from tests.training.written import metadata, same, weights

Train = Callable[..., int]
CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs", "--text_encoder_batch_size", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_family.write(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def train_toy(monkeypatch: pytest.MonkeyPatch, train: Train, model: Path) -> Train:
    """The one line, and `train` on the model."""
    monkeypatch.setitem(FAMILIES, "toy", "tests.toy_family.Toy")
    return lambda *words: train("--pretrained_model_name_or_path", str(model), *words)


def test_it_trains_validates_samples_and_saves(train_toy: Train, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("emoji of cat --w 72 --h 64 --s 2 --d 5\n", encoding="utf-8")
    samples = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "4")
    compare = ("--compare_prompts", "emoji of dog", "--compare_steps", "2")
    more = (
        "--validation_split",
        "0.3",
        "--report",
        "--loss_plot",
        "--learning_rate",
        "1e-2",
        "--optimizer_type",
        "AdamW",
    )
    assert train_toy(*samples, *compare, *more, "--max_train_steps", "12") == 0
    facts = metadata(tmp_path)
    assert (facts["ss_base_model_version"], facts["modelspec.architecture"]) == ("toy", "toy-v1/lora")
    assert facts["ss_zero_terminal_snr"] == "False"
    assert "modelspec.prediction_type" not in facts  # which has no word for it
    found = weights(tmp_path)
    assert {key.split("_blocks_")[0] for key in found} == {"lora_unet", "lora_te"}
    # LoRAs of six layers in the text encoder's block, and of four in the transformer's two: qkv is one
    assert len(found) == 3 * (6 + 2 * 4)
    assert found["lora_unet_blocks_0_attn_qkv.lora_down.weight"].shape == (3 * 4, 32)
    assert found["lora_unet_blocks_0_attn_qkv.lora_up.weight"].shape == (3 * 32, 3 * 4)
    assert all(tensor.abs().max() > 0 for key, tensor in found.items() if "lora_up" in key)
    for name in ("test-report.html", "test-loss.png", "test-compare.png", "test-best.safetensors"):
        assert (tmp_path / "out" / name).is_file(), name
    (first, *_) = sorted((tmp_path / "out" / "sample").glob("*_00_*.png"))
    assert np.asarray(Image.open(first)).shape == (64, 64, 3)  # 72 is no multiple of 16


@pytest.mark.slow
def test_the_loss_falls(train_toy: Train, tmp_path: Path) -> None:
    assert train_toy("--validation_split", "0.3", "--learning_rate", "2e-2", "--max_train_steps", "60") == 0
    with safe_open(tmp_path / "out" / "test-best.safetensors", framework="pt") as file:
        assert int(file.metadata()["ss_steps"]) > 30, "the best is late: it goes on learning"


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(train_toy: Train, tmp_path: Path) -> None:
    common = ("--network_dropout", "0.1", "--flip_aug")
    assert train_toy(*common, "--output_name", "whole") == 0
    assert train_toy(*common, "--output_name", "part", "--save_every_n_steps", "2", "--save_state") == 0
    state = tmp_path / "out" / "part-step00000002-state"
    assert train_toy(*common, "--output_name", "part", "--overwrite", "--resume", str(state)) == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "part"))


def test_fused_layers_are_split_where_they_are_read(train_toy: Train, model: Path, tmp_path: Path) -> None:
    """As starting weights, with the sizes of the file, and merged into the base."""
    assert train_toy("--network_train_unet_only", "--learning_rate", "1e-2", "--max_train_steps", "3") == 0
    file = tmp_path / "out" / "test.safetensors"
    (fused,) = (key for key in load_file(file) if key.endswith("blocks_1_attn_qkv.lora_up.weight"))
    tensors = {
        key.removeprefix(fused.removesuffix("lora_up.weight")): tensor for key, tensor in load_file(file).items()
    }
    product = tensors["lora_up.weight"] @ tensors["lora_down.weight"] * tensors["alpha"] / 12

    family = open_family(str(model))
    family.components.load("denoiser", torch.float32, "cpu")
    attention = family.components["denoiser"].get_submodule("blocks.1.attn")
    before = [getattr(attention, name).weight.clone() for name in ("to_q", "to_k", "to_v")]
    merged = BaseWeights([str(file)], [])
    merge_into(merged, family.adapter_targets())
    merged.report()
    after = [getattr(attention, name).weight for name in ("to_q", "to_k", "to_v")]
    change = torch.cat([now - was for now, was in zip(after, before, strict=True)])
    torch.testing.assert_close(change, product, rtol=0, atol=1e-6)

    # a step at a rate that moves nothing: what is loaded is what is written
    again = ("--network_train_unet_only", "--network_weights", str(file), "--learning_rate", "1e-12")
    again += ("--optimizer_type", "SGD", "--max_train_steps", "1")
    for name, words in {"loaded": (), "sized": ("--dim_from_weights",)}.items():
        assert (
            train_toy(*again, *words, "--max_train_steps", "1", "--output_name", name, "--optimizer_type", "SGD") == 0
        )
        for key, tensor in weights(tmp_path, name).items():
            torch.testing.assert_close(tensor, load_file(file)[key], rtol=0, atol=1e-7, msg=f"{name} {key}")


@pytest.mark.parametrize("alphas", [(2.0, 2.0, 2.0), (1.0, 2.0, 4.0)])
def test_a_fused_pair_is_the_members_one_above_the_other(alphas: tuple[float, ...]) -> None:
    """Also where they have different scales, and one of them adds nothing and has no tensors."""
    generator = torch.Generator().manual_seed(0)
    sites = [Site(f"to_{name}", "unet", "unet", torch.nn.Linear(8, 6), fused="qkv") for name in ("q", "k", "v")]
    tensors = {}
    for site, alpha in zip(sites, alphas, strict=True):
        tensors[f"{site.name}.lora_down.weight"] = torch.randn(4, 8, generator=generator)
        tensors[f"{site.name}.lora_up.weight"] = torch.randn(6, 4, generator=generator)
        tensors[f"{site.name}.alpha"] = torch.tensor(alpha)
    for absent in ("", "to_k"):
        given = {key: tensor for key, tensor in tensors.items() if not absent or not key.startswith(absent)}
        fused = fuse(given, sites)
        assert fused.keys() == {"qkv.lora_down.weight", "qkv.lora_up.weight", "qkv.alpha"}

        def product(named: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
            down, up, alpha = (named[f"{layer}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
            return up @ down * alpha / len(down)

        expected = [torch.zeros(6, 8) if site.name == absent else product(tensors, site.name) for site in sites]
        torch.testing.assert_close(product(fused, "qkv"), torch.cat(expected))
        apart = split(fused, sites)
        for site, own in zip(sites, expected, strict=True):
            torch.testing.assert_close(product(apart, site.name), own)
        if not absent:
            assert all(len(apart[f"{site.name}.lora_down.weight"]) == 4 for site in sites)
    # of another program, whose members share their `down`
    shared = {"qkv.lora_down.weight": torch.randn(6, 8), "qkv.lora_up.weight": torch.randn(18, 6)}
    for place, site in enumerate(sites):
        rows = product(shared | {"qkv.alpha": torch.tensor(6.0)}, "qkv")[6 * place : 6 * place + 6]
        torch.testing.assert_close(product(split(shared, sites), site.name), rows)


def test_texts_of_several_lengths_train_the_same_from_every_cache(train_toy: Train, tmp_path: Path) -> None:
    disk = ("--cache_text_encoder_outputs_to_disk", "--cache_latents_to_disk")
    for name, words in {
        "none": CACHED[:1],
        "memory": CACHED,
        "first": (*CACHED, *disk),
        "again": (*CACHED, *disk),
    }.items():
        assert train_toy(*words, "--output_name", name) == 0
    expected = weights(tmp_path, "none")
    for name in ("memory", "first", "again"):
        for key, tensor in weights(tmp_path, name).items():
            # a batch of other lengths rounds otherwise: a step of Adam may differ by a part of the rate
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2e-4, msg=f"{name} {key}")
    assert same(weights(tmp_path, "first"), weights(tmp_path, "again"))


@pytest.mark.parametrize(
    "words",
    [
        ("--gradient_checkpointing", "--train_batch_size", "3"),
        ("--mixed_precision", "bf16", *CACHED),
        ("--mixed_precision", "bf16", "--fp8_base"),
        (
            "--loss_type",
            "huber",
            "--noise_offset",
            "0.1",
            "--multires_noise_iterations",
            "4",
            "--ip_noise_gamma",
            "0.1",
        ),
        ("--timestep_sampling", "sigmoid", "--min_timestep", "100", "--max_timestep", "900", "--training_shift", "2"),
        (
            "--no-cache_latents",
            "--random_crop",
            "--enable_bucket",
            "--min_bucket_reso",
            "32",
            "--bucket_reso_steps",
            "16",
        ),
        slow((("--lr_layer_decay", "0.5"),)),
        ("--network_args", "block_dims=2,4", "down_lr_weight=0.5,1"),
        slow((("--dry_run",),)),
        ("--recommend",),
        ("--find_lr", "--find_lr_steps", "20"),
        slow((("--max_token_length", "225"),)),
    ],
    ids=" ".join,
)
def test_settings_work(train_toy: Train, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert train_toy(*words, "--max_train_steps", "2") == 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--clip_skip", "2"), "is a toy model; the option is for a Stable Diffusion 1.x or 2.x model"),
        (("--v2",), "is a toy model; the option is for"),
        (("--min_snr_gamma", "5"), "--min_snr_gamma: .* is trained by flow matching"),
    ],
)
def test_what_belongs_to_other_families_is_refused(
    train_toy: Train, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    import re

    assert train_toy(*words) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_damaged_part_is_named(train_toy: Train, model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "transformer" / "model.safetensors").write_bytes(b"")
    from library.errors import UserError

    with pytest.raises(UserError, match=r"transformer.model\.safetensors"):
        open_family(str(broken))
