"""Frozen layers whose weight is decoded where it is used, whatever it is held as.

Autograd would keep the decoded weight of every layer for the backward pass, and a convolution its input as well, which
only the gradient of its weight needs. Here a layer keeps the weight as it is held, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from library.config.registry import load
from library.errors import UserError
from library.quantization import FORMATS
from library.quantization.packed import PackedWeight

Pair = tuple[int, ...]
Shape = tuple[Pair, str | Pair, Pair, int]  # a convolution's stride, padding, dilation and groups


@dataclass(frozen=True)
class Held:
    """How weights are held: in one of FORMATS. option: the option that asks for it, for messages."""

    format: str
    option: str

    def packing(self, layer: str) -> Callable[[Tensor], Tensor]:
        """A function that packs a layer's weight. It raises UserError, with the layer's name, for what cannot be."""
        pack = load(FORMATS, self.format, where=self.option)

        def packed(weight: Tensor) -> Tensor:
            try:
                found: Tensor = pack(weight)
            except UserError as error:
                raise UserError(f"{self.option}: {layer} has {error}") from None
            return found

        return packed


def compute_frozen(layer: nn.Linear | nn.Conv2d) -> None:
    """Patch the `forward` of this layer alone. Its weight and bias must be frozen."""
    vars(layer)["forward"] = partial(_forward, layer)


def is_own(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether this forward is the operation of the layer with its weight as it is, not decoded."""
    if isinstance(forward, partial) and forward.func is _forward:
        return not isinstance(layer.weight, PackedWeight) and layer.weight.dtype != torch.float8_e4m3fn
    return forward == MethodType(type(layer).forward, layer)


def decoded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's values in the dtype that the layer computes in."""
    return (weight.decode() if isinstance(weight, PackedWeight) else weight).to(dtype)


def _forward(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """As the layer's own, in the precision that autocast asks for, else that of `x`."""
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none
    dtype = torch.get_autocast_dtype(kind) if casts else x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    if isinstance(layer, nn.Linear):
        return _Linear.apply(x.to(dtype), layer.weight, bias)
    shape = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return _Conv2d.apply(x.to(dtype), layer.weight, bias, shape)


class _Context(Protocol):
    """The context that torch passes to `forward` and later to `backward`."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _ConvContext(_Context, Protocol):
    size: torch.Size
    shape: Shape


class _Linear(torch.autograd.Function):
    """`F.linear` with a frozen weight and bias."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, decoded(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return gradient @ decoded(weight, gradient.dtype), None, None


class _Conv2d(torch.autograd.Function):
    """`F.conv2d` with a frozen weight and bias; `shape`: stride, padding, dilation, groups."""

    @staticmethod
    def forward(ctx: _ConvContext, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.shape = x.shape, shape
        stride, padding, dilation, groups = shape
        return F.conv2d(x, decoded(weight, x.dtype), bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: _ConvContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        weight = decoded(weight, gradient.dtype)
        return conv2d_input(ctx.size, weight, gradient, *ctx.shape), None, None, None
