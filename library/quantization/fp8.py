"""float8_e4m3fn as it is, without a scale (kohya's --fp8_base): three bits of mantissa.

A weight is off by 1/16 of itself at most, and below 2⁻⁶ by 2⁻¹⁰. It needs no packed form: torch has the type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.errors import UserError

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # a larger weight would become NaN


def pack(weight: Tensor) -> Tensor:
    """The weight rounded to 8 bits, a plain tensor."""
    least, most = weight.aminmax()
    if not (least >= -LARGEST and most <= LARGEST):  # NaN as well
        raise UserError(f"weights beyond {LARGEST:g}, the range of 8 bits")
    return weight.to(FLOAT8)
