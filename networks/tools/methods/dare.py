"""DARE (Yu et al. 2023, arXiv 2311.03099): drop weights of each difference at random, scale up the rest, and add.

A weight is dropped with the probability p = 1 - density, and those that stay are divided by density, so that the
expected sum is the weighted sum. The draws depend on seed, layer and the file's place alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from library.rng import torch_generator
from networks.tools.methods import Settings, linear


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """The weighted sum of what is left."""
    return linear.combine(thinned(deltas, settings), weights, settings)


def thinned(deltas: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    """Each difference with its share `density` of elements, scaled up."""
    return [_thinned(delta, place, settings) for place, delta in enumerate(deltas)]


def _thinned(delta: Tensor, place: int, settings: Settings) -> Tensor:
    generator = torch_generator(settings.seed, settings.layer, place, "dare")
    # by number, not by shape: a convolution is a matrix in one tool and has its axes in another
    draws = torch.rand(delta.numel(), generator=generator).view(delta.shape)
    return torch.where(draws.to(delta.device) < settings.density, delta / settings.density, 0)
