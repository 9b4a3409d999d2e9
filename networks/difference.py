"""What full differences and norms have in common: trained differences of a layer's weight and of its bias, from 0."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.quantization.frozen import weight_of
from networks.adapter import Adapter, Shape
from networks.settings import Asked, LayerSizes, RateSettings
from networks.sites import Site

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.models.blocks import Blocks


@dataclass(frozen=True)
class Form:
    """bias: whether it has a difference of the bias."""

    bias: bool


class Difference(Adapter):
    """`weight + m * difference`, `bias + m * difference`.

    A kind gives `NAMES`, that of the weight's difference first, and `apply_with`.
    """

    form: Form

    def apply_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's operation with another weight and bias."""
        raise NotImplementedError

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """The first as the weight, the second (out)."""
        of_weight, of_bias = self.NAMES
        return {of_weight: weight} | ({of_bias: weight[:1]} if self.form.bias else {})

    @classmethod
    def lacking(cls, names: Collection[str]) -> str | None:
        return None if cls.NAMES[0] in names else cls.NAMES[0]

    @classmethod
    def new(
        cls, site: Site, asked: Asked, sizes: LayerSizes, settings: RateSettings, blocks: Blocks | None
    ) -> Self | None:
        cls.refuse_without(asked, "dim", "alpha", "dropout")
        return cls(site, form=Form(bias=site.module.bias is not None), seed=asked.seed)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> Form:
        return Form(bias=cls.NAMES[1] in tensors)

    def initialise(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def _differences(self) -> tuple[Tensor, Tensor | None]:
        weight = self.get_parameter(self.NAMES[0])
        return weight, self.get_parameter(self.NAMES[1]) if self.form.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's operation once, with the sums, where these lose nothing; beside a weight in 16 or 8 bits a second
        time with the differences alone: most of them lies below half a unit in the weight's last place."""
        layer = self.site.module
        if self.is_off():
            return self.base_forward(x)
        if layer.weight.dtype != torch.float32 or not self.alone:
            return self.share(x).add_(self.base_forward(x))
        of_weight, of_bias = self._differences()
        bias = layer.bias
        if bias is not None and of_bias is not None:
            bias = torch.add(bias, of_bias, alpha=self.multiplier)
        return self.apply_with(x, torch.add(weight_of(layer), of_weight, alpha=self.multiplier), bias)

    def share(self, x: Tensor) -> Tensor:
        of_weight, of_bias = self._differences()
        bias = None if of_bias is None else (of_bias * self.multiplier).to(x.dtype)
        return self.apply_with(x, (of_weight * self.multiplier).to(x.dtype), bias)

    @classmethod
    def delta_of(cls, tensors: Mapping[str, Tensor], weight: Shape) -> Tensor:
        return tensors[cls.NAMES[0]].to(torch.float32, copy=True)

    @classmethod
    def effective_bias(cls, bias: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        more = tensors.get(cls.NAMES[1])
        return bias if more is None else bias.float() + more.to(bias.device, torch.float32) * multiplier

    def is_zero(self) -> bool:
        return not any(parameter.any() for parameter in self.parameters())

    def shrink(self, ratio: float) -> None:
        for parameter in self.parameters():
            parameter.mul_(ratio)
