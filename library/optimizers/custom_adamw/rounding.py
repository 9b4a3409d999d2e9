"""Stochastic rounding of float32 results to bfloat16 weights.

bfloat16 keeps 8 bits: a step below 1/512 of the weight would always be rounded away. The random bits are a hash of
(parameter, step, place) and not a stream, so that a resumed run rounds as the uninterrupted one does.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """A 32-bit hash (C. Wellons' lowbias32) of int64 tensors that hold 0 ... 2^32 - 1."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def to_bfloat16(x: Tensor, *, ordinals: Tensor, step: Tensor | float) -> Tensor:
    """float32 [k, n] → bfloat16: up with the probability of the dropped bits. `ordinals` int64 [k, 1] name the rows."""
    # on the host: a 0-d host tensor works with tensors of any device, and is not copied to a GPU
    steps = step.long() if isinstance(step, Tensor) else int(step)
    rows = mix((mix(ordinals & _MASK) + steps) & _MASK)
    places = torch.arange(x.shape[-1], device=x.device)
    noise = mix((rows + places * 0x9E3779B9) & _MASK) >> 16
    bits = x.contiguous().view(torch.int32).long()
    rounded = ((bits + noise) & ~0xFFFF).int().view(torch.float32)
    return rounded.where(x.isfinite(), x).to(torch.bfloat16)
