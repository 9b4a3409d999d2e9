"""Small base models of both versions, as folders and as single files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_layout import configuration, single_file, weights_of
from safetensors.torch import save_file

from library.models.checkpoints.base_model import BaseModel
from library.models.stable_diffusion import StableDiffusion
from tests import tiny_sd2

BASE = Path(__file__).parents[2] / "quickstart" / "base"


@pytest.fixture(scope="session")
def tiny_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with the form of SD 2: Linear projections, another text encoder, velocity; random weights."""
    return tiny_sd2.write(tmp_path_factory.mktemp("tiny_v2"))


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
