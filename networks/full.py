"""Full difference: trains a difference of the weight's own size, and one of the bias.

`--network_module networks.full`. `W + m * diff`, `b + m * diff_b`: LyCORIS' `algo=full`. It has no rank: its files are
as large as the layers themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from networks.adapter import product
from networks.difference import Difference
from networks.settings import Asked, LayerSizes
from networks.settings import RateSettings as Settings
from networks.sites import Site, find_sites

if TYPE_CHECKING:
    from library.models.family import AdapterTargets

DIFF, DIFF_BIAS = "diff", "diff_b"


@dataclass(frozen=True, kw_only=True)
class Sizes(LayerSizes):
    """enable_conv: the ResNet blocks and resamplers of the UNet as well."""

    enable_conv: bool = False


class Full(Difference):
    """The difference on one layer: diff as the weight, diff_b (out)."""

    NAME = "full"
    NOUN = "whole weight differences"
    NAMES = (DIFF, DIFF_BIAS)
    SETTINGS = Settings
    SIZES = Sizes

    @classmethod
    def sites(cls, targets: Sequence[AdapterTargets], asked: Asked, sizes: LayerSizes) -> list[Site]:
        assert isinstance(sizes, Sizes)
        return find_sites(targets, conv=sizes.enable_conv)

    def apply_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(self.site.module, x, weight, bias)
