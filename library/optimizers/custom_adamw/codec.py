"""8-bit moments: bitsandbytes' dynamic maps, 256 values to a block, one float32 maximum for each block.

The maps are those of Dettmers et al. 2022 (arXiv 2110.02861): a magnitude in [0, 1] has seven decades below 1, and
decade d = 0 ... 6, (10^(d-7), 10^(d-6)], holds P = 2^d (signed) or 2^(d+1) (unsigned) evenly spaced values

    10^(d-6) (0.1 + 0.9 (i + 0.5) / P),   i = 0 ... P-1;    then come 0, and 1 on the positive side.

So the nearest entry needs no search: the decade is found among eight thresholds, and the place in it is a division.
bitsandbytes' own CPU routine rounds through a 65,536-bin table and misses the nearest entry for 6 % (signed) to 20 %
(unsigned) of the values. kernel/storage.h does the same arithmetic and computes the same codes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from library.gpu import to_device

BLOCK = 256
DECADES = 7


class Map(NamedTuple):
    """`values`: 256, ascending. `thresholds`: 8 magnitudes, those midway between 0 and the first value, between each
    decade's last value and the next one's first, and between the last value and 1. `tens`: 10^(6-d) for each decade."""

    values: Tensor
    thresholds: Tensor
    tens: Tensor
    signed: bool


@lru_cache
def dynamic_map(*, signed: bool, device: torch.device | None = None) -> Map:
    """The signed map for first moments, the unsigned one for second moments."""
    decades = []
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, places(decade, signed=signed) + 1)
        decades.append(10.0 ** (decade + 1 - DECADES) * ((edges[:-1] + edges[1:]) / 2))
    ends = torch.tensor([[0.0, *(float(d[-1]) for d in decades)], [*(float(d[0]) for d in decades), 1.0]])
    positive = torch.cat(decades)
    values = torch.cat([positive, torch.tensor([0.0, 1.0]), *([-positive] if signed else [])]).sort().values
    tens = torch.tensor([10.0 ** (DECADES - 1 - decade) for decade in range(DECADES)])
    values, thresholds, tens = (to_device(table, device or table.device) for table in (values, ends.mean(0), tens))
    return Map(values, thresholds, tens, signed)


def places(decade: int, *, signed: bool) -> int:
    """P, the number of values of a decade."""
    return 2**decade if signed else 2 ** (decade + 1)


def blocks(n: int) -> int:
    """The number of blocks of n values; the last one may be shorter."""
    return -(-n // BLOCK)


def decode(codes: Tensor, peaks: Tensor, table: Map) -> Tensor:
    """float32 [k, n] from codes uint8 [k, n] and peaks float32 [k, blocks(n)]."""
    scale = peaks.repeat_interleave(BLOCK, dim=-1)[:, : codes.shape[-1]]
    return table.values[codes.int()] * scale


def nearest(y: Tensor, table: Map) -> Tensor:
    """Codes (int32) of the entries nearest to y in [-1, 1]; within 1e-5 of a midpoint, either neighbour."""
    size = y.abs()
    decade = torch.bucketize(size, table.thresholds[1:DECADES], out_int32=True)
    count = torch.bitwise_left_shift(places(0, signed=table.signed), decade)
    place = ((size * table.tens[decade] - 0.1) * (1 / 0.9) * count).int()
    code = place.minimum(count - 1) + count - (0 if table.signed else 1)
    code = code.where(size > table.thresholds[0], 0)
    code = code + (y > table.thresholds[DECADES])
    return torch.where(y < 0, 127 - code, 127 + code) if table.signed else code


def encode(x: Tensor, table: Map, *, floor: bool = False) -> tuple[Tensor, Tensor]:
    """Codes uint8 [k, n] of the nearest entries, and each block's largest magnitude float32 [k, blocks(n)].

    `floor` keeps positive values positive: a second moment that is small beside its neighbours must not become 0,
    because with ADOPT it is the whole denominator.
    """
    k, n = x.shape
    padded = F.pad(x, (0, blocks(n) * BLOCK - n)).view(k, blocks(n), BLOCK)
    peaks = padded.abs().amax(-1)
    peaks = peaks.where(peaks >= torch.finfo(torch.float32).tiny, 0)  # 1 / a subnormal number may be infinite
    scaled = padded * (1 / peaks.where(peaks > 0, 1)).unsqueeze(-1)
    codes = nearest(scaled, table)
    if floor:
        codes = codes.clamp(min=1).where(scaled > 0, codes)
    return codes.to(torch.uint8).view(k, -1)[:, :n], peaks
