"""TIES (Yadav et al. 2023, arXiv 2306.01708, algorithm 1), layer by layer.

Trim: of each file's difference only the share `density` of largest magnitude stays. Elect: the sign of a weight is that
of the sum over the files. Merge: the mean over those files whose trimmed weight is not 0 and has this sign. A file's
weight multiplies its difference before the signs are elected, so that equal weights of λ are the paper's λ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from networks.tools.methods import Settings


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """The mean of those that agree."""
    trimmed = [trim(delta, settings.density).mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
    return agreeing_mean(trimmed)


def trim(delta: Tensor, density: float) -> Tensor:
    """A copy with this share of the elements, at least one: those of largest magnitude; of equal ones any."""
    count = max(1, round(density * delta.numel()))
    flat = delta.flatten()
    kept = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view(delta.shape)


def agreeing_mean(terms: Sequence[Tensor]) -> Tensor:
    """By element, the mean of the terms that have the sign of the sum of all; 0 where the sum is 0."""
    elected = torch.zeros_like(terms[0])
    for term in terms:
        elected.add_(term)
    elected.sign_()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for term in terms:
        agrees = term * elected > 0
        total.add_(torch.where(agrees, term, 0))
        count.add_(agrees)
    return total.div_(count.clamp_(min=1))
