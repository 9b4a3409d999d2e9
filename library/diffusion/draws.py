"""The random draws of a step, each sample's from its own key; made on the CPU, so the same on every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import rng

if TYPE_CHECKING:
    from library.data.dataset import Draw


def generator(seed: int, draw: Draw, purpose: str) -> torch.Generator:
    """The generator of one sample for one purpose."""
    return rng.torch_generator(seed, draw.epoch, draw.repeat, draw.sample.key, purpose)


def stacked_normal(shape: Sequence[int], seed: int, draws: Sequence[Draw], purpose: str) -> Tensor:
    """Standard normal [B, *shape], fp32."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, draw, purpose)) for draw in draws])


def stacked_shares(seed: int, draws: Sequence[Draw], purpose: str) -> Tensor:
    """Uniform in 0 ... 1, one per sample: [B, 1, 1, 1], fp32."""
    return torch.stack([torch.rand(1, 1, 1, generator=generator(seed, draw, purpose)) for draw in draws])
