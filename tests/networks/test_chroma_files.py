"""Adapter files for Chroma: FLUX.1's names without the modulation, and that both namings act as trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import check_reading, difference, trained
from safetensors.torch import load_file
from torch import Tensor

from library.models.checkpoints.base_model import ASSETS, read_json
from library.models.checkpoints.flux_names import fused_name, fused_place, original_name
from library.models.chroma import Chroma
from library.models.family import AdapterTargets
from library.models.modules import new_chroma_transformer
from library.models.opening import open_family
from networks.formats.fused import fuse
from networks.formats.loaders import is_about, verdicts
from networks.formats.naming import to_diffusers
from networks.sites import find_sites
from tests import tiny_chroma as tiny

# Largest difference of an output, relative to the largest output, in fp32: the order of multiplications differs
BOUND = 1e-5
NOISY = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def chroma(tiny_chroma: Path) -> Any:
    family = open_family(str(tiny_chroma))
    family.components.load_all(family.PARTS, torch.float32, "cpu")
    return family


def outputs(family: Any) -> tuple[Tensor]:
    with torch.no_grad():
        texts = family.encode_prompts(["emoji of cat", "a dog"])
        return (family.predict(NOISY, torch.tensor([0.3, 0.8]), texts),)


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_a_file_is_read_as_it_acts(chroma: Any, tmp_path: Path, naming: str) -> None:
    check_reading(chroma, outputs, tmp_path / "adapter.safetensors", naming, bound=BOUND)


def test_kohyas_names(chroma: Any, tmp_path: Path) -> None:
    """Per double block eight layers, per single block two, and nothing of the text encoder."""
    trained(chroma, outputs, tmp_path / "adapter.safetensors", "kohya")
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

    expected = trained(chroma, outputs, tmp_path / "adapter.safetensors", "diffusers")
    pipeline = ChromaPipeline.from_pretrained(tiny_chroma, dtype=torch.float32)
    for library in ("diffusers", "transformers", "peft"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    said = [record.getMessage() for record in caplog.records if "lora" in record.getMessage().lower()]
    assert all("No LoRA keys associated to T5EncoderModel" in message for message in said), said
    layers = [module for module in pipeline.transformer.modules() if hasattr(module, "lora_A")]
    assert len(layers) == tiny.DOUBLES * 12 + tiny.SINGLES * 5
    own = chroma.components["denoiser"]
    # the padding of one of the two texts is masked by diffusers' own blocks here, queries and all
    try:
        chroma.components["denoiser"] = pipeline.transformer
        found = outputs(chroma)
    finally:
        chroma.components["denoiser"] = own
    for now, before in zip(found, expected, strict=True):
        assert difference(now, before) < BOUND


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
    sites, tensors = find_sites([target], conv=False), {}
    for number, site in enumerate(sites):
        rows, columns = site.module.weight.shape
        tensors[f"{site.name}.lora_down.weight"] = torch.full((1, columns), float(number))
        tensors[f"{site.name}.lora_up.weight"] = torch.full((rows, 1), float(number + 1))
        tensors[f"{site.name}.alpha"] = torch.tensor(1.0)
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
