"""Adapter files for Anima: ComfyUI's and diffusers' dotted names, kohya's flat ones, and that both act as trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_models import (
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

from library.models.checkpoints.anima_names import dotted_name, original_name
from library.models.modules import new_anima_transformer
from networks.files import read
from networks.formats import loaders
from networks.formats.naming import to_diffusers
from tests import tiny_anima as tiny

PARTS = {"denoiser": 10 * tiny.BLOCKS, "text_encoder": 7 * tiny.TEXT_LAYERS}


@pytest.fixture(scope="module")
def anima(tiny_anima: Path) -> Any:
    return flow_family("anima", tiny_anima)


def test_names_and_who_loads_them(anima: Any, tmp_path: Path) -> None:
    trained(anima, flow_outputs, tmp_path / "kohya.safetensors", "kohya")
    trained(anima, flow_outputs, tmp_path / "dotted.safetensors", "diffusers")
    flat, dotted = (load_file(tmp_path / f"{name}.safetensors") for name in ("kohya", "dotted"))
    names = {key.partition(".")[0] for key in flat}
    assert names > {"lora_unet_blocks_1_cross_attn_output_proj", "lora_te_layers_0_mlp_gate_proj"}
    assert {f"{dotted_name(name)}.lora_{which}.weight" for name in names for which in "AB"} == dotted.keys()
    total, unet = sum(PARTS.values()), PARTS["denoiser"]
    for tensors, expected in (
        (flat, {"ComfyUI": unet, "kohya": total}),
        (dotted, {"ComfyUI": total, "diffusers": unet}),
    ):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        found = loaders.verdicts(shapes, version="anima")
        assert {one.program: one.found for one in found if one.found} == expected
        assert all(one.exact == one.found for one in found)


def test_diffusers_loads_every_layer_and_gives_the_same_output(
    anima: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.modular_pipelines.anima import AnimaAutoBlocks

    expected, _ = trained(anima, flow_outputs, tmp_path / "adapter.safetensors", "diffusers", "denoiser")
    parts = tiny.parts()
    pipeline = AnimaAutoBlocks().init_pipeline()
    pipeline.update_components(transformer=parts["transformer"], text_conditioner=parts["text_conditioner"])
    assert not load_in_diffusers(pipeline, tmp_path / "adapter.safetensors", caplog, monkeypatch)
    assert adapted(parts["transformer"]) == PARTS["denoiser"]
    _resize_masks(monkeypatch)
    states = torch.nn.functional.pad(flow_outputs(anima)[1], (0, 0, 0, 512 - flow_outputs(anima)[1].shape[1]))
    with torch.no_grad():
        found = parts["transformer"](
            hidden_states=flow_noise(anima)[:, :, None],
            timestep=LEVELS,
            encoder_hidden_states=states,
            padding_mask=torch.zeros(1, 1, 64, 64),
        ).sample[:, :, 0]
    assert difference(found, expected) < FLOW_BOUND


def _resize_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of torchvision."""
    from diffusers.models.transformers import transformer_cosmos

    functional = SimpleNamespace(resize=lambda mask, size, interpolation: mask[..., : size[0], : size[1]])
    transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST=0))
    monkeypatch.setattr(transformer_cosmos, "transforms", transforms, raising=False)


def test_diffusers_own_paths_are_read(anima: Any, tmp_path: Path) -> None:
    """`transformer.transformer_blocks.0.attn1.to_q`, as peft and diffusers' training scripts write them."""
    trained(anima, flow_outputs, tmp_path / "kohya.safetensors", "kohya", "denoiser")
    paths = {
        original_name(path): path for path, _ in anima.components["denoiser"].named_modules() if "transformer" in path
    }
    dotted = to_diffusers(load_file(tmp_path / "kohya.safetensors"), source="test")
    renamed = {}
    for key, tensor in dotted.items():
        name, _, end = key.removeprefix("diffusion_model.").partition(".lora_")
        renamed[f"transformer.{paths[name]}.lora_{end}"] = tensor
    save_file(renamed, tmp_path / "peft.safetensors")
    assert read(tmp_path / "peft.safetensors").layers.keys() == read(tmp_path / "kohya.safetensors").layers.keys()


def test_the_true_size_in_diffusers_own_reader() -> None:
    """All 280 layers at the true size become those of diffusers' transformer."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers

    from library.models.anima import Anima

    config = json.loads((tiny.ASSETS / "anima.json").read_text(encoding="utf-8"))["transformer"]
    pattern = Anima.PARTS["denoiser"].linear
    layers = {path: layer for path, layer in new_anima_transformer(config).named_modules() if pattern.fullmatch(path)}
    names = {path: "lora_unet_" + original_name(path).replace(".", "_") for path in layers}
    tensors = numbered((names[path], layer) for path, layer in layers.items())
    theirs = _convert_non_diffusers_anima_lora_to_diffusers(to_diffusers(tensors, source="test"))
    assert theirs.keys() == {f"transformer.{path}.lora_{which}.weight" for path in layers for which in "AB"}
    assert len(theirs) == 2 * 280
