"""Adapter files for Chroma: FLUX.1's names without the modulation, and that both namings act as trained."""

from __future__ import annotations

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
from safetensors.torch import load_file
from torch import Tensor

from library.models.checkpoints.base_model import ASSETS, read_json
from library.models.checkpoints.flux_names import fused_name, fused_place, original_name
from library.models.chroma import Chroma
from library.models.family import AdapterTargets
from library.models.modules import new_chroma_transformer
from networks.formats.fused import fuse
from networks.formats.loaders import is_about, verdicts
from networks.formats.naming import to_diffusers
from networks.sites import find_sites
from tests import tiny_chroma as tiny


@pytest.fixture(scope="module")
def chroma(tiny_chroma: Path) -> Any:
    return flow_family("chroma", tiny_chroma)


def test_kohyas_names(chroma: Any, tmp_path: Path) -> None:
    """Per double block eight layers, per single block two, and nothing of the text encoder."""
    trained(chroma, flow_outputs, tmp_path / "adapter.safetensors", "kohya")
    tensors = load_file(tmp_path / "adapter.safetensors")
    modules = {key.partition(".")[0] for key in tensors}
    assert modules == {
        f"lora_unet_double_blocks_{i}_{stream}_{layer}"
        for i in range(tiny.DOUBLES)
        for stream in ("img", "txt")
        for layer in ("attn_qkv", "attn_proj", "mlp_0", "mlp_2")
    } | {f"lora_unet_single_blocks_{i}_{layer}" for i in range(tiny.SINGLES) for layer in ("linear1", "linear2")}


def test_diffusers_loads_every_layer_and_gives_the_same_output(
    chroma: Any, tiny_chroma: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--save_naming diffusers. Its reader of kohya's names knows the true width only."""
    from diffusers import ChromaPipeline

    expected = trained(chroma, flow_outputs, tmp_path / "adapter.safetensors", "diffusers")
    pipeline = ChromaPipeline.from_pretrained(tiny_chroma, dtype=torch.float32)
    said = load_in_diffusers(pipeline, tmp_path / "adapter.safetensors", caplog, monkeypatch)
    assert all("No LoRA keys associated to T5EncoderModel" in message for message in said), said
    assert adapted(pipeline.transformer) == tiny.DOUBLES * 12 + tiny.SINGLES * 5
    own = chroma.components["denoiser"]
    # the padding of one of the two texts is masked by diffusers' own blocks here, queries and all
    try:
        chroma.components["denoiser"] = pipeline.transformer
        found = flow_outputs(chroma)
    finally:
        chroma.components["denoiser"] = own
    for now, before in zip(found, expected, strict=True):
        assert difference(now, before) < FLOW_BOUND


def test_the_true_size_in_diffusers_own_reader() -> None:
    """All 228 layers of a file at the true size become the 418 layers of diffusers' transformer, each as it was."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    kind = Chroma.PARTS["denoiser"]
    target = AdapterTargets(
        *("unet", "lora_unet", new_chroma_transformer(read_json(ASSETS / "chroma.json")["transformer"])),
        *(kind.linear, kind.conv),
        name=original_name,
        fused=fused_name,
        place=fused_place,
    )
    sites = find_sites([target], conv=False)
    tensors = numbered((site.name, site.module) for site in sites)
    fused = fuse(tensors, sites)
    assert len({key.partition(".")[0] for key in fused}) == 228
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(fused))
    ours = to_diffusers(fused, source="test")
    assert len(theirs) == len(ours) == 2 * 418
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    _loads(fused, ours)


def _loads(kohya: dict[str, Tensor], diffusers: dict[str, Tensor]) -> None:
    """Which programs load them. Forge maps diffusers' names for repositories that are called flux alone."""
    assert is_about("chroma")
    for tensors, without in ((kohya, {"A1111", "LyCORIS"}), (diffusers, {"A1111", "LyCORIS", "Forge", "kohya"})):
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        found = verdicts(shapes, version="chroma")
        assert {one.program for one in found if one.exact == one.total} == {one.program for one in found} - without
    modulation = {f"lora_unet_double_blocks_0_img_mod_lin.{end}.weight": (2, 2) for end in ("lora_down", "lora_up")}
    assert all(one.found == 0 for one in verdicts(modulation, version="chroma"))
