"""8 bits and a scale for each output channel: float8_e4m3fn ("fp8_scaled") or whole numbers from -127 to 127 ("int8").

The largest weight of a channel gets the largest code. A channel and not the whole tensor, since some channels have
weights many times as large as others, and one number to a channel is no memory to speak of.

* fp8_scaled: off by 1/16 of the weight at most, like fp8, but down to 2⁻¹⁴ / 448 of the channel's largest: fp8 alone
  loses digits below 2⁻⁶ = 0.016, where most weights of these models lie.
* int8: off by 1/254 of the channel's largest at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.quantization.fp8 import FLOAT8, LARGEST
from library.quantization.packed import PackedWeight, largest

_SMALLEST = torch.finfo(torch.float32).tiny  # a scale: channels of zeros stay zeros


class Scaled(PackedWeight):
    """codes [out, in, …], float8_e4m3fn or int8; scale [out, 1, …], fp32."""

    PARTS = ("codes", "scale")
    codes: Tensor
    scale: Tensor

    def decode(self) -> Tensor:
        """Rounded to the weight's dtype once."""
        return self.codes.float().mul_(self.scale).to(self.dtype)


def pack_fp8(weight: Tensor) -> Tensor:
    """fp8_scaled."""
    scale = _scale(weight, LARGEST)
    return Scaled({"codes": (weight / scale).clamp_(-LARGEST, LARGEST).to(FLOAT8), "scale": scale}, *_outer(weight))


def pack_int8(weight: Tensor) -> Tensor:
    """int8, symmetric."""
    scale = _scale(weight, 127)
    codes = (weight / scale).round_().clamp_(-127, 127).to(torch.int8)
    return Scaled({"codes": codes, "scale": scale}, *_outer(weight))


def _scale(weight: Tensor, limit: float) -> Tensor:
    return (largest(weight) / limit).clamp_(min=_SMALLEST).view(-1, *(1,) * (weight.ndim - 1))


def _outer(weight: Tensor) -> tuple[torch.Size, torch.dtype]:
    return weight.shape, weight.dtype
