"""A layer whose weight is packed, as `Components.load` does it while loading."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from library.quantization.frozen import Held, compute_frozen

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def held(layer: Layer, format: str) -> Layer:
    """The same layer, frozen, with its weight in this format."""
    layer.requires_grad_(False)
    pack = Held(format, "--base_format").packing("it")
    layer.weight = nn.Parameter(pack(layer.weight.detach()), requires_grad=False)
    compute_frozen(layer)
    return layer
