"""Σ weight · difference: task arithmetic (Ilharco et al. 2023, arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from networks.tools.methods import Settings


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """The weighted sum."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total
