"""Frozen layers whose weights are held in 8 bits (kohya's --fp8_base): half of bf16's memory, computed in bf16 or fp16.

Only the weights of the layers that adapters can sit on are held so, over 99 % of Stable Diffusion's denoiser; biases,
norms, embeddings and the first and last layers keep their precision. float8_e4m3fn has three bits of mantissa and no
scale: a weight is off by 1/16 of itself at most, and below 2⁻⁶ by 2⁻¹⁰.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from library.errors import UserError
from library.progress import bar

FLOAT8 = torch.float8_e4m3fn
Pair = tuple[int, ...]
Shape = tuple[Pair, str | Pair, Pair, int]  # a convolution's stride, padding, dilation and groups
_LARGEST = torch.finfo(FLOAT8).max  # a larger weight would become NaN


def hold_in_float8(layers: Sequence[tuple[str, nn.Module]], device: torch.device | None = None) -> int:
    """Round the weights of these layers and patch their `forward` to compute with them. Returns their number.

    `layers`: (name for messages, layer). `device`: the device on which each weight is rounded, and stays; None: its
    current one.

    To be called before adapters are attached and after others are merged in. Raises UserError for a weight that is too
    large for the format, before that layer is changed.
    """
    for name, layer in bar(layers, desc="weights to 8 bits", unit="layer"):
        assert isinstance(layer, nn.Linear | nn.Conv2d), f"{name}: neither Linear nor Conv2d"
        weight = layer.weight.detach().to(device or layer.weight.device)
        least, most = weight.aminmax()
        if not (least >= -_LARGEST and most <= _LARGEST):  # NaN as well
            raise UserError(f"--fp8_base: {name} has weights beyond {_LARGEST:g}, the range of 8 bits")
        layer.weight = nn.Parameter(weight.to(FLOAT8), requires_grad=False)
        vars(layer)["forward"] = partial(_forward, layer)  # of this layer alone
    return len(layers)


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
    """Autograd would keep the converted weight of every layer for the backward pass; here it keeps the 8 bits."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


class _Conv2d(torch.autograd.Function):
    """The same for convolutions; `shape`: stride, padding, dilation, groups."""

    @staticmethod
    def forward(ctx: _ConvContext, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.shape = x.shape, shape
        stride, padding, dilation, groups = shape
        return F.conv2d(x, weight.to(x.dtype), bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: _ConvContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        weight = weight.to(gradient.dtype)
        return conv2d_input(ctx.size, weight, gradient, *ctx.shape), None, None, None
