"""Frozen layers whose weights are held in 8 bits (kohya's --fp8_base): half of bf16's memory, computed in bf16 or fp16.

Only the weights of the layers that adapters can sit on are held so, over 99 % of Stable Diffusion's denoiser; biases,
norms, embeddings and the first and last layers keep their precision. float8_e4m3fn has three bits of mantissa and no
scale: a weight is off by 1/16 of itself at most, and below 2⁻⁶ by 2⁻¹⁰.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from library.errors import UserError
from library.progress import bar
from library.quantization.frozen import compute_frozen

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max  # a larger weight would become NaN


def hold_in_float8(layers: Sequence[tuple[str, nn.Module]], device: torch.device | None = None) -> int:
    """Round the weights of these layers and have the layers compute with them. Returns their number.

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
        compute_frozen(layer)
    return len(layers)
