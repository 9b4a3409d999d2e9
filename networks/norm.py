"""Norms: trains the weight and the bias of LayerNorms and GroupNorms.

`--network_module networks.norm`, or LyCORIS' `train_norm=True` beside another kind: `weight + m * w_norm`,
`bias + m * b_norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from networks.difference import Difference
from networks.layers import Preset
from networks.settings import Asked, LayerSizes
from networks.settings import RateSettings as Settings
from networks.sites import Site, find_norms

if TYPE_CHECKING:
    from library.models.family import AdapterTargets

WEIGHT, BIAS = "w_norm", "b_norm"


@dataclass(frozen=True, kw_only=True)
class Sizes(LayerSizes):
    """enable_conv: the norms of the ResNet blocks as well, not only those of the attention blocks."""

    enable_conv: bool = False


class Norm(Difference):
    """The differences of one norm's weight and bias, both as the norm's weight."""

    NAME = "norm"
    NOUN = "normalisation layers"
    NAMES = (WEIGHT, BIAS)
    SETTINGS = Settings
    SIZES = Sizes
    LAYERS = (nn.LayerNorm, nn.GroupNorm)

    @classmethod
    def sites(cls, targets: Sequence[AdapterTargets], asked: Asked, sizes: LayerSizes) -> list[Site]:
        assert isinstance(sizes, Sizes)
        found = find_norms(targets, conv=sizes.enable_conv)
        if not found:
            raise UserError("networks.norm: there is no LayerNorm and no GroupNorm beside this model's adapted layers")
        return found

    @classmethod
    def sites_in(cls, targets: Sequence[AdapterTargets], preset: Preset) -> list[Site]:
        return find_norms(targets, conv=bool(preset.conv))

    def apply_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self.site.module
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        assert isinstance(layer, nn.LayerNorm)
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
