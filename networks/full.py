"""Full difference: trains a difference of the weight's own size, and one of the bias.

`--network_module networks.full`. `W + m * diff`, `b + m * diff_b`: LyCORIS' `algo=full`. It has no rank: its files are
as large as the layers themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from networks.adapter import Adapter, Shape, product
from networks.settings import Asked, LayerSizes, RateSettings
from networks.settings import RateSettings as Settings
from networks.sites import Site, find_sites

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.models.blocks import Blocks
    from library.models.family import AdapterTargets

DIFF, DIFF_BIAS = "diff", "diff_b"


@dataclass(frozen=True, kw_only=True)
class Sizes(LayerSizes):
    """enable_conv: the ResNet blocks and resamplers of the UNet as well."""

    enable_conv: bool = False


@dataclass(frozen=True)
class Form:
    """bias: whether it has a difference of the bias."""

    bias: bool = False


class Full(Adapter):
    """The difference on one layer, from 0."""

    NAME = "full"
    NOUN = "whole weight differences"
    NAMES = (DIFF, DIFF_BIAS)
    SETTINGS = Settings
    SIZES = Sizes

    form: Form
    diff: nn.Parameter
    diff_b: nn.Parameter

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """diff as the weight, diff_b (out)."""
        return {DIFF: weight} | ({DIFF_BIAS: (weight[0],)} if self.form.bias else {})

    @classmethod
    def lacking(cls, names: Collection[str]) -> str | None:
        return None if DIFF in names else DIFF

    @classmethod
    def sites(cls, targets: Sequence[AdapterTargets], asked: Asked, sizes: LayerSizes) -> list[Site]:
        assert isinstance(sizes, Sizes)
        return find_sites(targets, conv=sizes.enable_conv)

    @classmethod
    def new(
        cls, site: Site, asked: Asked, sizes: LayerSizes, settings: RateSettings, blocks: Blocks | None
    ) -> Self | None:
        cls.refuse_without(asked, "dim", "alpha", "dropout")
        return cls(site, form=Form(bias=site.module.bias is not None), seed=asked.seed)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> Form:
        return Form(bias=DIFF_BIAS in tensors)

    def initialise(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """One product where the sum of weight and difference loses nothing; beside a weight in 16 or 8 bits the
        difference has a product of its own: most of it lies below half a unit in the weight's last place."""
        layer = self.site.module
        if self.multiplier == 0:
            return self.base_forward(x)
        if layer.weight.dtype != torch.float32 or not self.alone:
            return self.share(x).add_(self.base_forward(x))
        weight = torch.add(layer.weight, self.diff, alpha=self.multiplier)
        bias = layer.bias
        if bias is not None and self.form.bias:
            bias = torch.add(bias, self.diff_b, alpha=self.multiplier)
        return product(layer, x, weight, bias)

    def share(self, x: Tensor) -> Tensor:
        bias = (self.diff_b * self.multiplier).to(x.dtype) if self.form.bias else None
        return product(self.site.module, x, (self.diff * self.multiplier).to(x.dtype), bias)

    @classmethod
    def delta_of(cls, tensors: Mapping[str, Tensor], weight: Shape) -> Tensor:
        return tensors[DIFF].to(torch.float32, copy=True)

    @classmethod
    def effective_bias(cls, bias: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        more = tensors.get(DIFF_BIAS)
        return bias if more is None else bias.float() + more.to(bias.device, torch.float32) * multiplier

    def is_zero(self) -> bool:
        return not any(parameter.any() for parameter in self.parameters())

    def shrink(self, ratio: float) -> None:
        for parameter in self.parameters():
            parameter.mul_(ratio)
