"""DARE (arXiv 2311.03099) in the place of the trimming of TIES (arXiv 2306.01708): drop at random, scale up, elect a
sign for each weight, and take the mean of those that agree."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from networks.tools.methods import Settings
from networks.tools.methods.dare import thinned
from networks.tools.methods.ties import agreeing_mean


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """The mean of those that agree."""
    return agreeing_mean([one * weight for one, weight in zip(thinned(deltas, settings), weights, strict=True)])
