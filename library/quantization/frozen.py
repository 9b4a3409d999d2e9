"""Frozen layers whose weight is decoded where it is used, whatever it is held as.

Autograd would keep the decoded weight of every layer for the backward pass, and a convolution its input as well, which
only the gradient of its weight needs. Here a layer keeps the weight as it is held, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from library.config.registry import load
from library.errors import UserError
from library.progress import bar
from library.quantization import FORMATS
from library.quantization.packed import PackedWeight

Pair = tuple[int, ...]
Shape = tuple[Pair, str | Pair, Pair, int]  # a convolution's stride, padding, dilation and groups


def hold(layers: Sequence[tuple[str, nn.Module]], format: str, device: torch.device | None = None) -> int:
    """Pack the weights of these layers and have the layers compute with them. Returns their number."""
    pack = load(FORMATS, format, where="the format of frozen weights")
    for name, layer in bar(layers, desc=f"weights to {format}", unit="layer"):
        assert isinstance(layer, nn.Linear | nn.Conv2d), f"{name}: neither Linear nor Conv2d"
        weight = layer.weight.detach().to(device or layer.weight.device)
        try:
            layer.weight = nn.Parameter(pack(weight), requires_grad=False)
        except UserError as error:
            raise UserError(f"--fp8_base: {name} has {error}") from None
        compute_frozen(layer)
    return len(layers)


def compute_frozen(layer: nn.Linear | nn.Conv2d) -> None:
    """Patch the `forward` of this layer alone. Its weight and bias must be frozen."""
    vars(layer)["forward"] = partial(_forward, layer)


def decoded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's values in the dtype that the layer computes in."""
    return (weight.decode() if isinstance(weight, PackedWeight) else weight).to(dtype)


def _forward(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """As the layer's own, in the precision that autocast asks for, else that of `x`."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
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
