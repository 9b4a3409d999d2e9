"""Adapter files merged into a model that is loaded already; a run merges them while it loads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from library.models.family import AdapterTargets
from networks.merge import BaseWeights


@torch.no_grad()
def merge_into(weights: BaseWeights, targets: Sequence[AdapterTargets]) -> None:
    """Make the changes of these files to the layers."""
    for (layer, leaf), change in weights.changes(targets).items():
        weight = layer.get_parameter(leaf)
        weight.copy_(change(weight))
