"""Adapter files for FLUX.2 klein: kohya's names, as musubi-tuner has them, with fused layers, diffusers' names and
ComfyUI's, and that all act as trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import (
    CAPTIONS,
    FLOW_BOUND,
    LEVELS,
    adapted,
    difference,
    flow_family,
    flow_noise,
    flow_outputs,
    load_in_diffusers,
    numbered,
    trained,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.models.checkpoints import flux2_names, flux_names
from library.models.family import AdapterTargets
from library.models.flux2 import Flux2Klein
from library.models.modules import new_flux2_transformer
from networks.create import create_to_merge
from networks.files import read
from networks.formats import loaders
from networks.formats.fused import fuse
from networks.formats.naming import to_diffusers
from networks.sites import find_sites
from networks.tools.check import report
from tests import tiny_flux2 as tiny
from tests.flow_families import FLOW

STREAMS = ("attn_qkv", "attn_proj", "mlp_0", "mlp_2")
LAYERS_OF_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}


@pytest.fixture(scope="module")
def klein(tiny_flux2: Path) -> Any:
    return flow_family("flux2", tiny_flux2)


def kohyas_names(doubles: int, singles: int) -> set[str]:
    """Of the layers that musubi-tuner's module trains: eight in a double block, two in a single one."""
    found = {
        f"lora_unet_double_blocks_{i}_{stream}_{layer}"
        for i in range(doubles)
        for stream in ("img", "txt")
        for layer in STREAMS
    }
    return found | {f"lora_unet_single_blocks_{i}_linear{number}" for i in range(singles) for number in (1, 2)}


def test_kohyas_names(klein: Any, tmp_path: Path) -> None:
    trained(klein, flow_outputs, tmp_path / "adapter.safetensors", "kohya")
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert {key.partition(".")[0] for key in tensors} == kohyas_names(tiny.DOUBLES, tiny.SINGLES)
    width = tiny.WIDTH
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (3 * width, 9)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (9 * width, 3)  # one in the model


def test_comfyuis_names_of_the_original_layout_are_read(klein: Any, tmp_path: Path) -> None:
    """As ai-toolkit writes them: without alpha."""
    (expected,) = trained(klein, flow_outputs, tmp_path / "kohya.safetensors", "kohya")
    tensors = load_file(tmp_path / "kohya.safetensors")
    dotted: dict[str, Tensor] = {}
    for key in [key for key in tensors if key.endswith("lora_down.weight")]:
        name = key.partition(".")[0]
        up = tensors[f"{name}.lora_up.weight"]
        path = name.removeprefix("lora_unet_").replace("_blocks_", "_blocks.", 1).replace("_", ".")
        path = path.replace("double.blocks", "double_blocks").replace("single.blocks", "single_blocks")
        path = path.replace("img.", "img_").replace("txt.", "txt_")
        dotted[f"diffusion_model.{path}.lora_A.weight"] = tensors[key]
        dotted[f"diffusion_model.{path}.lora_B.weight"] = up * (tensors[f"{name}.alpha"] / up.shape[1])
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in dotted
    save_file(dotted, tmp_path / "dotted.safetensors")
    content = read(tmp_path / "dotted.safetensors")
    assert content.naming == "ComfyUI"
    network = create_to_merge(content, klein.adapter_targets(), multiplier=1.0)
    network.load(content)
    network.attach()
    (found,) = flow_outputs(klein)
    network.detach()
    assert difference(found, expected) < FLOW_BOUND
    shapes = {name: tuple(tensor.shape) for name, tensor in dotted.items()}
    verdicts = loaders.verdicts(shapes, version="flux_2_klein_4b")
    assert {one.program for one in verdicts if one.exact} == {"ComfyUI", "diffusers"}


@pytest.mark.slow
def test_who_loads_them(klein: Any, tmp_path: Path) -> None:
    for naming in ("kohya", "diffusers"):
        path = tmp_path / f"{naming}.safetensors"
        trained(klein, flow_outputs, path, naming)
        shapes = {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
        layers = len(kohyas_names(tiny.DOUBLES, tiny.SINGLES)) if naming == "kohya" else tiny.LAYERS
        found = {one.program: one for one in loaders.verdicts(shapes, version="flux_2_klein_9b")}
        assert {name: one.exact for name, one in found.items() if one.found} == {"ComfyUI": layers, "diffusers": layers}
        assert "musubi-tuner does" in str(found["kohya"].notes) or naming == "diffusers"
        lines, is_loaded = report(path, base=klein.path)
        assert is_loaded
        assert any("ComfyUI" in line and f"{layers} of {layers}" in line for line in lines), lines


@pytest.mark.parametrize("naming", ["kohya", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_diffusers_loads_every_layer_and_gives_the_same_output(
    klein: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, naming: str
) -> None:
    (expected,) = trained(klein, flow_outputs, tmp_path / "adapter.safetensors", naming)
    pipeline = tiny.pipeline()
    assert not load_in_diffusers(pipeline, tmp_path / "adapter.safetensors", caplog, monkeypatch)
    assert adapted(pipeline.transformer) == tiny.LAYERS
    noisy, (_, tokens) = flow_noise(klein), FLOW["flux2"].length
    with torch.no_grad():
        states, text_ids = pipeline.encode_prompt(CAPTIONS, max_sequence_length=tokens)
        found = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy),
            encoder_hidden_states=states,
            timestep=LEVELS,
            img_ids=pipeline._prepare_latent_ids(noisy),
            txt_ids=text_ids,
        ).sample
    assert difference(found, pipeline._pack_latents(expected)) < FLOW_BOUND


@pytest.mark.parametrize(
    ("more", "layers", "leaves", "per_rank"), [({}, 80, 100, 490 * 3072), (LAYERS_OF_9B, 112, 144, 664 * 4096)]
)
def test_the_true_size_in_diffusers_own_reader(more: dict[str, int], layers: int, leaves: int, per_rank: int) -> None:
    """All layers of a file at the true size become those of diffusers' transformer, each as it was: from kohya's names
    by its own reader, and by ours."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux2_lora_to_diffusers

    config = json.loads((tiny.ASSETS / "flux2.json").read_text(encoding="utf-8"))["transformer"] | more
    kind = Flux2Klein.PARTS["denoiser"]
    target = AdapterTargets(
        *("unet", "lora_unet", new_flux2_transformer(config), kind.linear, kind.conv),
        name=flux2_names.original_name,
        fused=flux_names.fused_name,
        place=flux_names.fused_place,
    )
    sites = find_sites([target], conv=False)
    tensors = numbered((site.name, site.module) for site in sites)
    fused = fuse(tensors, sites)
    names = {key.partition(".")[0] for key in fused}
    assert names == kohyas_names(config["num_layers"], config["num_single_layers"])
    assert len(names) == layers
    assert sum(t.numel() for key, t in tensors.items() if not key.endswith("alpha")) == per_rank
    theirs, ours = _convert_kohya_flux2_lora_to_diffusers(dict(fused)), to_diffusers(fused, source="test")
    assert theirs.keys() == ours.keys()
    assert len(ours) == 2 * leaves
    by_path = {site.alias: site.name for site in sites}
    for key, found in ours.items():
        assert torch.equal(found, theirs[key]), key
        path = key.removeprefix("transformer.").removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        end = "lora_down.weight" if "lora_A" in key else "lora_up.weight"
        assert torch.equal(found, tensors[f"{by_path['lora_unet_' + path.replace('.', '_')]}.{end}"]), key


def test_names_that_flux_1_has_as_well_are_told_apart_by_sizes() -> None:
    """Of the same name in kohya's files, another layer in diffusers."""
    for name, of_flux_1, of_flux_2 in (
        ("single_blocks_0_linear1", (7, 1), (9, 1)),
        ("single_blocks_0_linear2", (1, 5), (1, 4)),
        ("double_blocks_0_img_mlp_0", (4, 1), (6, 1)),
        ("double_blocks_0_txt_mlp_2", (1, 4), (1, 3)),
    ):
        assert flux2_names.is_of_flux2(name, *(64 * side for side in of_flux_2)), name
        assert not flux2_names.is_of_flux2(name, *(64 * side for side in of_flux_1)), name
    same = "double_blocks_0_img_attn_qkv"
    assert not flux2_names.is_of_flux2(same, 3 * 64, 64)
    assert flux2_names.members_of(same) == flux_names.members_of(same)
    assert flux2_names.members_of("single_blocks_0_modulation_lin") == ()
