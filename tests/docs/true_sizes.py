"""The shapes of a LoRA's tensors on Stable Diffusion 1.5 and XL at their true sizes, without weights."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.true_outlines import write
from library.models.opening import open_family
from networks.create import create
from networks.settings import Asked

NAMES = {"SD 1.5": "sd15", "SDXL": "sdxl"}


@lru_cache
def shapes(model: str, *, rank: int, text: bool = True, preset: str | None = None) -> tuple[tuple[int, ...], ...]:
    """Of each trained tensor of `networks.lora`. `model`: a key of NAMES. `text`: the text encoders' layers too."""
    with TemporaryDirectory() as folder:
        family = open_family(str(write(Path(folder) / NAMES[model], NAMES[model])))
        with family.outlined(), torch.no_grad():
            arguments = {} if preset is None else {"preset": preset}
            network = create("lora", family.adapter_targets(), Asked(dim=rank, alpha=rank / 2, seed=0), arguments)
            return tuple(
                tuple(tensor.shape)
                for name, tensor in network.named_parameters()
                if text or "lora_te" not in name.split(".")[0]
            )


def numbers(model: str, *, rank: int, text: bool = True, preset: str | None = None) -> int:
    """How many numbers such a LoRA trains."""
    return sum(map(_count, shapes(model, rank=rank, text=text, preset=preset)))


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
