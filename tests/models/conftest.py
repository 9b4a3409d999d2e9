"""Small base models of both versions, as folders and as single files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_layout import configuration, single_file, weights_of
from safetensors.torch import save_file

from library.models.base_model import ASSETS, BaseModel
from library.models.stable_diffusion import StableDiffusion

BASE = Path(__file__).parents[2] / "quickstart" / "base"


@pytest.fixture(scope="session")
def tiny_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with the form of SD 2: Linear projections, another text encoder, velocity; random weights."""
    from library.models.modules import new_text_encoder, new_unet, new_vae

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_v2")
    asset = json.loads((ASSETS / "sd2.json").read_text())
    unet = asset["unet"] | {
        "block_out_channels": [16, 32],
        "norm_num_groups": 8,
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 48,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    vae = asset["vae"] | {
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "scaling_factor": 0.5,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    text = asset["text_encoder"] | {"hidden_size": 48, "intermediate_size": 64}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    build = {"unet": (new_unet, unet), "vae": (new_vae, vae), "text_encoder": (new_text_encoder, text)}
    for part, (new, config) in build.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
        states = {n: torch.randn(p.shape) * 0.05 for n, p in new(config).named_parameters()}
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_file(states, folder / part / f"{stem}.safetensors")
    (folder / "scheduler").mkdir()
    scheduler = asset["scheduler"] | {"prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory, tiny_v2: Path) -> dict[str, Path]:
    """Single files: sd1 as safetensors, ckpt (zip) and old.ckpt (before torch 1.6), and sd2."""
    folder = tmp_path_factory.mktemp("files")
    states = single_file(*weights_of(BASE).values(), configuration(BASE))
    second = single_file(*weights_of(tiny_v2).values(), configuration(tiny_v2), open_clip=True)
    paths = {name: folder / name for name in ("sd1.safetensors", "sd1.ckpt", "sd1-old.ckpt", "sd2.safetensors")}
    contiguous = {name: tensor.contiguous() for name, tensor in states.items()}
    save_file(contiguous, paths["sd1.safetensors"])
    torch.save({"state_dict": states, "global_step": 7}, paths["sd1.ckpt"])
    torch.save({"state_dict": states}, paths["sd1-old.ckpt"], _use_new_zipfile_serialization=False)
    save_file({name: tensor.contiguous() for name, tensor in second.items()}, paths["sd2.safetensors"])
    return paths


@pytest.fixture
def family() -> Callable[..., StableDiffusion]:
    """A family over an opened base model, with the options that a test names."""

    def make(base: BaseModel, **options: Any) -> StableDiffusion:
        given: dict[str, Any] = {"v2": False, "v_parameterization": False, "vae": None}
        return StableDiffusion(base, **{**given, "clip_skip": None, "max_token_length": None, **options})

    return make
