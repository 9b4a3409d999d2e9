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

from library.config.registry import load
from library.errors import UserError
from library.quantization import FORMATS
from library.quantization.convolution import Shape, convolve, input_gradient
from library.quantization.fp8 import FLOAT8
from library.quantization.packed import PackedWeight

Fetch = Callable[[], Tensor]
"""Returns a swapped weight on the device; its memory is another weight's as soon as that one is fetched."""


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


def compute_swapped(layer: nn.Linear | nn.Conv2d, fetch: Fetch) -> None:
    """As `compute_frozen`, for a layer whose own weight is in host memory (`library.offload.swap`).

    The backward pass fetches the weight again: what autograd has saved would be another weight by then.
    """
    vars(layer)["fetch"] = fetch
    vars(layer)["forward"] = partial(_forward_swapped, layer, fetch)


def weight_of(layer: nn.Module) -> Tensor:
    """The layer's weight on the device that it computes on, to compute with it outside of the layer's own forward.

    Where gradients are recorded, a swapped weight is a copy: autograd may save it.
    """
    fetch: Fetch | None = vars(layer).get("fetch")
    if fetch is None:
        assert isinstance(layer.weight, Tensor)
        return layer.weight
    return fetch().clone() if torch.is_grad_enabled() else fetch()


def is_own(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether this forward is the operation of the layer with its weight as it is, not decoded."""
    if isinstance(forward, partial) and forward.func in (_forward, _forward_swapped):
        return not isinstance(layer.weight, PackedWeight) and layer.weight.dtype != FLOAT8
    return forward == MethodType(type(layer).forward, layer)


def decoded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's values in the dtype that the layer computes in."""
    return (weight.decode() if isinstance(weight, PackedWeight) else weight).to(dtype)


def _forward(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    return _computed(layer, x, layer.weight, None)


def _forward_swapped(layer: nn.Linear | nn.Conv2d, fetch: Fetch, x: Tensor) -> Tensor:
    return _computed(layer, x, fetch(), fetch)


def _computed(layer: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor, fetch: Fetch | None) -> Tensor:
    """As the layer's own, in the precision that autocast asks for, else that of `x`."""
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none
    dtype = torch.get_autocast_dtype(kind) if casts else x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    if isinstance(layer, nn.Linear):
        return _Linear.apply(x.to(dtype), weight, bias, fetch)
    shape = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return _Conv2d.apply(x.to(dtype), weight, bias, shape, fetch)


class _Context(Protocol):
    """The context that torch passes to `forward` and later to `backward`."""

    saved_tensors: tuple[Tensor, ...]
    fetch: Fetch | None

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _ConvContext(_Context, Protocol):
    size: torch.Size
    shape: Shape


def _keep(ctx: _Context, weight: Tensor, fetch: Fetch | None) -> None:
    """For the backward pass: the weight, or the way to it."""
    ctx.fetch = fetch
    if fetch is None:
        ctx.save_for_backward(weight)


def _kept(ctx: _Context) -> Tensor:
    return ctx.saved_tensors[0] if ctx.fetch is None else ctx.fetch()


class _Linear(torch.autograd.Function):
    """`F.linear` with a frozen weight and bias."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None, fetch: Fetch | None) -> Tensor:
        _keep(ctx, weight, fetch)
        return F.linear(x, decoded(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight = _kept(ctx)
        if type(weight) in (Tensor, nn.Parameter) and weight.dtype == gradient.dtype:
            # to the bit as torch's own Linear, which takes transposed gradients row by row as well
            rows = gradient.reshape(-1, gradient.shape[-1])
            return rows.mm(weight).view(*gradient.shape[:-1], -1), None, None, None
        return gradient @ decoded(weight, gradient.dtype), None, None, None


class _Conv2d(torch.autograd.Function):
    """`F.conv2d` with a frozen weight and bias; `shape`: stride, padding, dilation, groups."""

    @staticmethod
    def forward(
        ctx: _ConvContext, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, fetch: Fetch | None
    ) -> Tensor:
        _keep(ctx, weight, fetch)
        ctx.size, ctx.shape = x.shape, shape
        return convolve(x, decoded(weight, x.dtype), bias, shape)

    @staticmethod
    def backward(ctx: _ConvContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight = decoded(_kept(ctx), gradient.dtype)
        return input_gradient(ctx.size, weight, gradient, ctx.shape), None, None, None, None
