"""Norms: trains the weight and the bias of LayerNorms and GroupNorms.

`--network_module networks.norm`, or LyCORIS' `train_norm=True` beside another kind: `weight + m * w_norm`,
`bias + m * b_norm`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from networks.adapter import Adapter, Shape
from networks.layers import Preset
from networks.settings import Asked, LayerSizes, RateSettings
from networks.settings import RateSettings as Settings
from networks.sites import Site, find_norms

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.models.blocks import Blocks
    from library.models.family import AdapterTargets

WEIGHT, BIAS = "w_norm", "b_norm"


@dataclass(frozen=True, kw_only=True)
class Sizes(LayerSizes):
    """enable_conv: the norms of the ResNet blocks as well, not only those of the attention blocks."""

    enable_conv: bool = False


@dataclass(frozen=True)
class Form:
    """bias: whether it has a difference of the bias."""

    bias: bool = True


class Norm(Adapter):
    """The differences of one norm's weight and bias, from 0."""

    NAME = "norm"
    NOUN = "normalisation layers"
    NAMES = (WEIGHT, BIAS)
    SETTINGS = Settings
    SIZES = Sizes
    LAYERS = (nn.LayerNorm, nn.GroupNorm)

    form: Form
    w_norm: nn.Parameter
    b_norm: nn.Parameter

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """Both as the norm's weight."""
        return {WEIGHT: weight} | ({BIAS: weight} if self.form.bias else {})

    @classmethod
    def lacking(cls, names: Collection[str]) -> str | None:
        return None if WEIGHT in names else WEIGHT

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

    @classmethod
    def new(
        cls, site: Site, asked: Asked, sizes: LayerSizes, settings: RateSettings, blocks: Blocks | None
    ) -> Self | None:
        cls.refuse_without(asked, "dim", "alpha", "dropout")
        return cls(site, form=Form(bias=site.module.bias is not None), seed=asked.seed)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> Form:
        return Form(bias=BIAS in tensors)

    def initialise(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """The norm once, with the sums as its weight and bias; beside a weight in 16 bits, in which the sum would lose
        most of the difference, a second time with the differences alone."""
        layer = self.site.module
        if self.multiplier == 0:
            return self.base_forward(x)
        if layer.weight.dtype != torch.float32 or not self.alone:
            return self.share(x).add_(self.base_forward(x))
        bias = layer.bias
        if bias is not None and self.form.bias:
            bias = torch.add(bias, self.b_norm, alpha=self.multiplier)
        return self._normalised(x, torch.add(layer.weight, self.w_norm, alpha=self.multiplier), bias)

    def share(self, x: Tensor) -> Tensor:
        bias = (self.b_norm * self.multiplier).to(x.dtype) if self.form.bias else None
        return self._normalised(x, (self.w_norm * self.multiplier).to(x.dtype), bias)

    def _normalised(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self.site.module
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        assert isinstance(layer, nn.LayerNorm)
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)

    @classmethod
    def delta_of(cls, tensors: Mapping[str, Tensor], weight: Shape) -> Tensor:
        return tensors[WEIGHT].to(torch.float32, copy=True)

    @classmethod
    def effective_bias(cls, bias: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        more = tensors.get(BIAS)
        return bias if more is None else bias.float() + more.to(bias.device, torch.float32) * multiplier

    def is_zero(self) -> bool:
        return not any(parameter.any() for parameter in self.parameters())

    def shrink(self, ratio: float) -> None:
        for parameter in self.parameters():
            parameter.mul_(ratio)
