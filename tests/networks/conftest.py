"""Base models for the adapters: a toy, the true SD architectures without memory, and the small trained base."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapter_models import BASE, Toy, sd_targets, sdxl_family, unet_targets

from library.models.checkpoints.base_model import ASSETS
from library.models.opening import open_family

if TYPE_CHECKING:
    from pathlib import Path

    from library.models.family import AdapterTargets, ModelFamily


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


@pytest.fixture
def toy_targets(toy: Toy) -> list[AdapterTargets]:
    return [unet_targets(toy)]


def _meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()


@pytest.fixture(scope="session")
def true_sizes() -> dict[str, list[AdapterTargets]]:
    """The targets of SD 1.5, SD 2 and SDXL at their true sizes, on the meta device."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def targets(unet: dict[str, Any], text: dict[str, Any]) -> list[AdapterTargets]:
        return sd_targets(
            _meta(lambda: UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), **unet)),
            _meta(lambda: CLIPTextModel(CLIPTextConfig(**text))),
        )

    sd15 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    sd2 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    linear = {"use_linear_projection": True, "attention_head_dim": (5, 10, 20, 20)}
    asset = json.loads((ASSETS / "sdxl.json").read_text())
    sdxl = sdxl_family(
        ASSETS / "sdxl.json",
        _meta(lambda: UNet2DConditionModel.from_config(asset["unet"])),
        _meta(lambda: CLIPTextModel(CLIPTextConfig(**asset["text_encoder"]))),
        _meta(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**asset["text_encoder_2"]))),
    )
    return {
        "sdxl": sdxl.adapter_targets(),
        "sd15": targets({"cross_attention_dim": 768, "attention_head_dim": 8}, sd15),
        "sd2": targets({"cross_attention_dim": 1024, **linear}, sd2),
    }


@pytest.fixture
def sdxl(tiny_sdxl: Path) -> ModelFamily:
    """The tiny SDXL, loaded."""
    family = open_family(str(tiny_sdxl))
    family.components.load_all(family.components.text_encoders, torch.float32, "cpu")
    family.components.load("denoiser", torch.float32, "cpu")
    return family


@pytest.fixture
def tiny() -> tuple[Any, Any]:
    """(UNet, text encoder) of the small trained base, in fp32 and frozen."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(BASE, subfolder="text_encoder", dtype=torch.float32)
    return unet.requires_grad_(False).eval(), text_encoder.requires_grad_(False).eval()
