"""Adapter files for FLUX.1: kohya's names with fused layers, diffusers' names, and that both act as trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import (
    FLOW_BOUND,
    adapted,
    difference,
    flow_family,
    flow_outputs,
    load_in_diffusers,
    numbered,
    trained,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.models.checkpoints.flux_names import fused_name, fused_place, original_name
from library.models.modules import new_flux_transformer
from networks.formats.fused import fuse
from networks.formats.naming import to_diffusers
from networks.sites import find_sites
from networks.tools.convert import convert
from tests import tiny_flux as tiny


@pytest.fixture(scope="module")
def flux(tiny_flux: Path) -> Any:
    return flow_family("flux", tiny_flux)


def test_kohyas_names(flux: Any, tmp_path: Path) -> None:
    """Per double block ten layers, per single block three; of the text encoder six in each of its layers."""
    trained(flux, flow_outputs, tmp_path / "adapter.safetensors", "kohya")
    tensors = load_file(tmp_path / "adapter.safetensors")
    modules = {key.partition(".")[0] for key in tensors}
    streams = ("mod_lin", "attn_qkv", "attn_proj", "mlp_0", "mlp_2")
    expected = {
        f"lora_unet_double_blocks_{i}_{stream}_{layer}"
        for i in range(tiny.DOUBLES)
        for stream in ("img", "txt")
        for layer in streams
    }
    expected |= {
        f"lora_unet_single_blocks_{i}_{layer}"
        for i in range(tiny.SINGLES)
        for layer in ("linear1", "linear2", "modulation_lin")
    }
    assert {name for name in modules if name.startswith("lora_unet")} == expected
    texts = {name for name in modules if not name.startswith("lora_unet")}
    assert len(texts) == 12
    assert all(name.startswith("lora_te1_text_model_encoder_layers_") for name in texts)
    width = tiny.WIDTH
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (3 * width, 9)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * width, 12)
    # alpha / rank is the members' own
    assert tensors["lora_unet_single_blocks_0_linear1.alpha"] / 12 == pytest.approx(2 / 3)


def test_diffusers_loads_every_layer_and_gives_the_same_output(
    flux: Any, tiny_flux: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--save_naming diffusers. Its reader of kohya's names knows the true width only."""
    from diffusers import FluxPipeline

    expected = trained(flux, flow_outputs, tmp_path / "adapter.safetensors", "diffusers")
    pipeline = FluxPipeline.from_pretrained(tiny_flux, dtype=torch.float32)
    assert not load_in_diffusers(pipeline, tmp_path / "adapter.safetensors", caplog, monkeypatch)
    layers = tiny.DOUBLES * 14 + tiny.SINGLES * 6 + 12
    assert adapted(pipeline.transformer, pipeline.text_encoder) == layers
    own = {name: flux.components[name] for name in flux.PARTS}
    try:
        flux.components["denoiser"], flux.components["text_encoder"] = pipeline.transformer, pipeline.text_encoder
        found = flow_outputs(flux)
    finally:
        for name, module in own.items():
            flux.components[name] = module
    for now, before in zip(found, expected, strict=True):
        assert difference(now, before) < FLOW_BOUND


def test_some_layers_alone_are_fused(flux: Any, tmp_path: Path) -> None:
    trained(flux, flow_outputs, tmp_path / "diffusers.safetensors", "diffusers")
    some = {
        key: tensor
        for key, tensor in load_file(tmp_path / "diffusers.safetensors").items()
        if "single_transformer_blocks.0.attn.to_v" in key
    }
    save_file(some, tmp_path / "some.safetensors")
    convert(tmp_path / "some.safetensors", tmp_path / "one.safetensors", to="kohya")
    one = load_file(tmp_path / "one.safetensors")
    up = one["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    width = tiny.WIDTH
    assert up.shape == (7 * width, 3)
    assert not up[: 2 * width].any()
    assert up[2 * width : 3 * width].any()
    assert not up[3 * width :].any()


def _true_network() -> tuple[dict[str, Tensor], Any]:
    """A LoRA of rank 1 on the outline of the true transformer: the tensors that kohya's file has, and its layers."""
    config = tiny.configuration()["transformer"] | {
        "num_layers": 19,
        "num_single_layers": 38,
        "num_attention_heads": 24,
    }
    from library.models.family import AdapterTargets
    from library.models.flux import Flux1

    kind = Flux1.PARTS["denoiser"]
    target = AdapterTargets(
        *("unet", "lora_unet", new_flux_transformer(config), kind.linear, kind.conv),
        name=original_name,
        fused=fused_name,
        place=fused_place,
    )
    sites = find_sites([target], conv=False)
    return numbered((site.name, site.module) for site in sites), sites


def test_the_true_size_in_diffusers_own_reader() -> None:
    """All 304 layers of a file at the true size become the 494 layers of diffusers' transformer, each as it was."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    tensors, sites = _true_network()
    fused = fuse(tensors, sites)
    assert len({key.partition(".")[0] for key in fused}) == 304
    leaves = sum(t.numel() for key, t in tensors.items() if not key.endswith("alpha"))
    assert leaves == 5_369_856, "numbers of a rank"
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(fused))
    ours = to_diffusers(fused, source="test")
    assert len(theirs) == len(ours) == 2 * 494
    _same_products(ours, theirs)
    by_path = {site.alias: site.name for site in sites}
    for key, found in ours.items():
        path = key.removeprefix("transformer.").removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        end = "lora_down.weight" if "lora_A" in key else "lora_up.weight"
        assert torch.equal(found, tensors[f"{by_path['lora_unet_' + path.replace('.', '_')]}.{end}"]), key


def _same_products(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
