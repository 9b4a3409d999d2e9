"""Adapter files for Z-Image: the dotted names of ComfyUI and diffusers, flat ones, layers that are one in the original
layout, and that all act as trained."""

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
    every_kind,
    flow_family,
    flow_noise,
    flow_outputs,
    load_in_diffusers,
    numbered,
    randomize,
    trained,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.models.checkpoints.z_image_names import dotted_name
from library.models.modules import new_z_image_transformer
from library.models.z_image import ZImage
from networks import kinds
from networks.create import create, create_to_merge
from networks.files import AdapterFile, read
from networks.formats import loaders
from networks.formats.naming import to_diffusers
from networks.network import Network
from networks.settings import Asked
from networks.tools.check import report
from tests import tiny_z_image as tiny

LAYERS = 7 * tiny.LAYERS


@pytest.fixture(scope="module")
def z_image(tiny_z_image: Path) -> Any:
    return flow_family("z_image", tiny_z_image)


@pytest.mark.parametrize("naming", ["kohya", "ComfyUI"])
def test_layers_of_the_original_layout_are_read_apart(z_image: Any, tmp_path: Path, naming: str) -> None:
    """Query, key and value as one, as programs write them that train on that layout: flat or with dots."""
    (expected,) = trained(z_image, flow_outputs, tmp_path / "apart.safetensors", "kohya")
    tensors = load_file(tmp_path / "apart.safetensors")
    whole: dict[str, Tensor] = {}
    for i in range(tiny.LAYERS):
        block = f"lora_unet_layers_{i}_attention_"
        three = [f"{block}to_{which}" for which in "qkv"]
        whole[f"{block}qkv.lora_down.weight"] = torch.cat([tensors.pop(f"{name}.lora_down.weight") for name in three])
        whole[f"{block}qkv.lora_up.weight"] = torch.block_diag(
            *(tensors.pop(f"{name}.lora_up.weight") for name in three)
        )
        whole[f"{block}qkv.alpha"] = sum(tensors.pop(f"{name}.alpha") for name in three)
        for end in ("lora_down.weight", "lora_up.weight", "alpha"):
            whole[f"{block}out.{end}"] = tensors.pop(f"{block}to_out_0.{end}")
    whole |= tensors
    if naming == "ComfyUI":
        flat = {"_attention_": ".attention.", "_feed_forward_": ".feed_forward.", "lora_unet_layers_": "layers."}
        for old, new in flat.items():
            whole = {name.replace(old, new): tensor for name, tensor in whole.items()}
        whole = {f"diffusion_model.{name}": tensor for name, tensor in whole.items()}
    save_file(whole, tmp_path / "whole.safetensors")
    content = read(tmp_path / "whole.safetensors")
    assert content.naming == naming
    assert content.layers.keys() == read(tmp_path / "apart.safetensors").layers.keys()
    network = network_of(z_image, content)
    network.attach()
    (found,) = flow_outputs(z_image)
    network.detach()
    assert difference(found, expected) < FLOW_BOUND


def network_of(family: Any, content: AdapterFile) -> Network:
    network = create_to_merge(content, family.adapter_targets(), multiplier=1.0)
    network.load(content)
    return network


def test_names_and_who_loads_them(z_image: Any, tmp_path: Path) -> None:
    """ComfyUI finds the feed-forward layers of flat names, and no attention."""
    trained(z_image, flow_outputs, tmp_path / "kohya.safetensors", "kohya")
    trained(z_image, flow_outputs, tmp_path / "dotted.safetensors", "diffusers")
    flat, dotted = (load_file(tmp_path / f"{name}.safetensors") for name in ("kohya", "dotted"))
    names = {key.partition(".")[0] for key in flat}
    assert names > {"lora_unet_layers_1_attention_to_out_0", "lora_unet_layers_0_feed_forward_w3"}
    assert {f"{dotted_name(name)}.lora_{which}.weight" for name in names for which in "AB"} == dotted.keys()
    for tensors, expected in (
        (flat, {"ComfyUI": 3 * tiny.LAYERS, "diffusers": LAYERS}),
        (dotted, {"ComfyUI": LAYERS, "diffusers": LAYERS}),
    ):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        found = loaders.verdicts(shapes, version="z_image")
        assert {one.program: one.found for one in found if one.found} == expected
        assert all(one.exact == one.found for one in found)
    lines, is_loaded = report(tmp_path / "dotted.safetensors", base=z_image.path)
    assert is_loaded
    assert any("ComfyUI" in line and f"{LAYERS} of {LAYERS}" in line for line in lines), lines


@pytest.mark.parametrize("kind", every_kind("lokr", "dora"))
def test_every_kind_has_dotted_names_that_are_read(z_image: Any, tmp_path: Path, kind: str) -> None:
    """ComfyUI finds no attention layer under flat ones, whatever the kind. The norms of Z-Image are of no kind that is
    adapted."""
    if kind == "norm":
        pytest.skip("RMS norms")
    alone = {"preset": "attn-only"}  # the feed-forward layers have 341 outputs here, which not all kinds divide
    network = create(kind, z_image.adapter_targets(), Asked(dim=2, alpha=1.0, seed=1, is_lenient=True), alone)
    network.naming = "diffusers"
    network.attach()
    network.eval()
    randomize(network)
    (expected,) = flow_outputs(z_image)
    network.save(tmp_path / "adapter.safetensors", None, {"ss_network_module": f"networks.{kind}"})
    network.detach()
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert tensors
    assert all(name.startswith("diffusion_model.layers.") or "vera_" in name for name in tensors)
    if kinds.load(kind).reads():
        again = network_of(z_image, read(tmp_path / "adapter.safetensors"))
        again.attach()
        (found,) = flow_outputs(z_image)
        again.detach()
        assert difference(found, expected) < 1e-4


def test_diffusers_loads_every_layer_and_gives_the_same_output(
    z_image: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = trained(z_image, flow_outputs, tmp_path / "adapter.safetensors", "diffusers")
    pipeline = tiny.pipeline()
    assert not load_in_diffusers(pipeline, tmp_path / "adapter.safetensors", caplog, monkeypatch)
    assert adapted(pipeline.transformer) == LAYERS
    with torch.no_grad():
        states, _ = pipeline.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
        found = pipeline.transformer(list(flow_noise(z_image)[:, :, None]), 1 - LEVELS, states).sample
    assert difference(-torch.stack(found)[:, :, 0], expected) < FLOW_BOUND


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_the_true_size_in_diffusers_own_reader(naming: str) -> None:
    """All 210 layers at the true size become those of diffusers' transformer."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_z_image_lora_to_diffusers

    config = json.loads((tiny.ASSETS / "z_image.json").read_text(encoding="utf-8"))["transformer"]
    pattern = ZImage.PARTS["denoiser"].linear
    layers = {path: layer for path, layer in new_z_image_transformer(config).named_modules() if pattern.fullmatch(path)}
    tensors = numbered((f"lora_unet_{path.replace('.', '_')}", layer) for path, layer in layers.items())
    given = tensors if naming == "kohya" else to_diffusers(tensors, source="test")
    theirs = _convert_non_diffusers_z_image_lora_to_diffusers(given)
    assert theirs.keys() == {f"transformer.{path}.lora_{which}.weight" for path in layers for which in "AB"}
    assert len(theirs) == 2 * 210
