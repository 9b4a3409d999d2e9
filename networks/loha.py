"""LoHa: the element-wise product of two low-rank products beside each layer (Hyeon-Woo et al. 2022, arXiv 2108.06098).

`W + multiplier * alpha / r * (w1_a w1_b) * (w2_a w2_b)`, with r columns in each product and so a rank of up to r².
`--network_module networks.loha`. Of a convolution the weight is [out, in * height * width]; with `use_tucker` wide
kernels have a core of [r, r, height, width] in each product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from networks.adapter import Shape, generator_for
from networks.lora import projections
from networks.magnitude import DORA_SCALE, Form, WithMagnitude
from networks.settings import DecomposeSizes as Sizes
from networks.settings import RankSettings as Settings
from networks.sites import Site

W1_A, W1_B, W2_A, W2_B = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
T1, T2 = "hada_t1", "hada_t2"
_SPREAD = {W1_A: 0.1, W1_B: 1.0, W2_A: 0.0, W2_B: 1.0, T1: 0.1, T2: 0.1}  # of the first values, LyCORIS' numbers


class Factors(NamedTuple):
    """a1, a2: [out, r]. b1, b2: [r, in * height * width], with a Tucker core multiplied in. fp32."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor


class LoHa(WithMagnitude):
    """The two products on one layer. `w2_a` starts at 0, so that a new adapter changes nothing.

    Dropout in training is of w1_a [out, r], for a whole batch: `network_dropout` drops single values, `rank_dropout`
    columns, and both make up for what is missing. Delta is linear in w1_a, so its mean stays. (LyCORIS drops rows of
    delta, and does not make up for them.)
    """

    NAME = "loha"
    NOUN = "LoHa"
    NAMES = (W1_A, W1_B, W2_A, W2_B, T1, T2, DORA_SCALE)
    RAISED = W2_A  # as kohya's networks.loha
    SETTINGS = Settings
    SIZES = Sizes

    hada_w1_a: nn.Parameter
    hada_w2_a: nn.Parameter

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """a (out, r), b (r, in * height * width); with a core t (r, r, height, width): a (r, out), b (r, in)."""
        out, inputs, *kernel = weight
        if not self.form.tucker:
            a, b = (out, self.rank), (self.rank, inputs * math.prod(kernel))
            return {W1_A: a, W1_B: b, W2_A: a, W2_B: b}
        a, b, core = (self.rank, out), (self.rank, inputs), (self.rank, self.rank, *kernel)
        return {T1: core, W1_A: a, W1_B: b, T2: core, W2_A: a, W2_B: b}

    @classmethod
    def lacking(cls, names: Collection[str]) -> str | None:
        needed = (W1_A, W1_B, W2_A, W2_B, *((T1, T2) if T1 in names or T2 in names else ()))
        return next((name for name in needed if name not in names), None)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> Form:
        return replace(super().form_in(site, tensors), tucker=T1 in tensors)

    def initialise(self) -> None:
        """Normal, with LyCORIS' standard deviations."""
        for name, tensor in self.named_parameters():
            if name in _SPREAD:
                nn.init.normal_(tensor, std=_SPREAD[name], generator=generator_for(self, name))

    # -- on the layer

    def share(self, x: Tensor) -> Tensor:
        """As a LoRA of rank r² where that has fewer multiplications than delta itself, else with delta."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        a1, b1, a2, b2 = factors_in(self.tensors())
        if self.drops and self.training:
            a1 = self._dropped(a1)
        factors = Factors(*((tensor.to(dtype)) for tensor in (a1 * self.factor, b1, a2, b2)))
        weight = self.site.module.weight.shape
        if not self.has_cheap_pair:
            return self._project[0](x.to(dtype), _Hadamard.apply(*factors).view(weight))
        down, up = khatri_rao(factors)
        hidden = self._project[0](x.to(dtype), down.view(-1, *weight[1:]))
        return self._project[1](hidden, up.view(*up.shape, *(1 for _ in weight[2:])))

    @property
    def has_cheap_pair(self) -> bool:
        """Whether the LoRA of rank r² costs less than delta: r² (out + in) multiplications for each token (or place of
        an image), against out * in. Forming delta costs more than forming the pair, so that this holds for any number
        of tokens."""
        out, inputs = (shape := self.site.module.weight.shape)[0], shape[1:].numel()
        return self.rank**2 * (out + inputs) < out * inputs

    @property
    def _project(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
        return projections(self.site.module)

    def _dropped(self, a1: Tensor) -> Tensor:
        if self.dropout:
            a1 = F.dropout(a1, self.dropout)
        if self.rank_dropout:
            kept = torch.rand(self.rank, device=a1.device) > self.rank_dropout
            a1 = a1 * kept / (1 - self.rank_dropout)
        return a1

    # -- weights

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return len(tensors[W1_B])

    @classmethod
    def product_of(cls, tensors: Mapping[str, Tensor], weight: Shape) -> Tensor:
        a1, b1, a2, b2 = factors_in(tensors)
        return ((a1 @ b1) * (a2 @ b2)).view(tuple(weight))

    def completed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """OneTrainer writes a and b in the form of the layer's weight."""
        found = super().completed(tensors)
        flat = {} if self.form.tucker else {name: found[name].flatten(1) for name in _SPREAD if name in found}
        return found | flat

    def norm(self) -> Tensor:
        """Where that is cheaper by the pair of rank r²: |UD|² = tr((UᵀU)(DDᵀ))."""
        out, inputs = (shape := self.site.module.weight.shape)[0], shape[1:].numel()
        if self.form.axis is not None or self.rank**3 * (out + inputs) > 2 * out * inputs:
            return super().norm()
        down, up = khatri_rao(factors_in(self.tensors()))
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt() * abs(self.scale)

    def is_zero(self) -> bool:
        """Whether a factor is zero: w2_a is in a new adapter."""
        if self.form.axis is not None:
            return super().is_zero()
        return not all(parameter.any() for parameter in self.parameters())

    def shrink(self, ratio: float) -> None:
        self.hada_w1_a.mul_(ratio**0.5)
        self.hada_w2_a.mul_(ratio**0.5)


def khatri_rao(factors: Factors) -> tuple[Tensor, Tensor]:
    """down [r², in * height * width] and up [out, r²], whose product up @ down is (a1 b1) * (a2 b2) element by element:
    the column- and the row-wise Khatri-Rao product."""
    a1, b1, a2, b2 = factors
    return (b1[:, None] * b2[None]).flatten(0, 1), (a1[:, :, None] * a2[:, None]).flatten(1)


class _Hadamard(torch.autograd.Function):
    """(a1 b1) * (a2 b2), element by element. The backward pass forms both products again: each is as large as the
    layer's weight, and autograd would keep them of every layer."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        return (a1 @ b1).mul_(a2 @ b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a1, b1, a2, b2 = ctx.saved_tensors
        first, second = (a2 @ b2).mul_(gradient), (a1 @ b1).mul_(gradient)
        return first @ b1.T, a1.T @ first, second @ b2.T, a2.T @ second


def factors_in(tensors: Mapping[str, Tensor]) -> Factors:
    """Of the tensors of a layer as files have them, with the cores multiplied in."""
    a1, b1, a2, b2 = (tensors[name].float().flatten(1) for name in (W1_A, W1_B, W2_A, W2_B))
    if T1 not in tensors:
        return Factors(a1, b1, a2, b2)
    b1, b2 = (torch.einsum("pqhw,qi->pihw", tensors[core].float(), b).flatten(1) for core, b in ((T1, b1), (T2, b2)))
    return Factors(a1.T, b1, a2.T, b2)
