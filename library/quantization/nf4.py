"""4 bits: NF4 with double quantisation (Dettmers et al. 2023, QLoRA, arXiv 2305.14314), as bitsandbytes has it.

64 weights in a row share one scale, their largest magnitude; the 16 codes are quantiles of a normal distribution. The
scales are held in 8 bits themselves, 256 to an fp32 scale of their own: 4.127 bits a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.quantization.packed import PackedWeight, largest

BLOCK = 64
_BLOCK_OF_SCALES = 256
_AT_ONCE = 1 << 20  # weights that are packed in one go, a multiple of BLOCK: packing needs some 20 bytes for each


class NF4(PackedWeight):
    """codes [weights / 2, 1], two to a byte; absmax [blocks], 8 bits: of each block, less their mean `offset` [];
    scale [blocks / 256], fp32: of absmax; table [256], fp32: what the codes of absmax mean."""

    PARTS = ("codes", "absmax", "offset", "scale", "table")
    codes: Tensor
    absmax: Tensor
    offset: Tensor
    scale: Tensor
    table: Tensor

    def decode(self) -> Tensor:
        bnb = _operations()
        absmax = bnb.dequantize_blockwise.default(
            self.absmax, self.scale, self.table, _BLOCK_OF_SCALES, torch.float32
        ).add_(self.offset)
        # flat, and of even length: for others bitsandbytes has a slow way only
        count = 2 * len(self.codes)
        flat: Tensor = bnb.dequantize_4bit.default(self.codes, absmax, BLOCK, "nf4", (1, count), self.dtype)
        return flat.flatten()[: self.numel()].view(self.shape)


def pack(weight: Tensor) -> Tensor:
    """The bits of bitsandbytes' `quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")`,
    without its temporary tensors, which take 20 times the weight's bytes."""
    from bitsandbytes.functional import quantize_blockwise

    largest(weight)
    bnb = _operations()
    flat = weight.flatten()
    if flat.numel() % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    # allocated before the temporary tensors, whose memory then goes back to the system
    codes = torch.empty(len(flat) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-len(flat) // BLOCK), device=flat.device)
    for start in range(0, len(flat), _AT_ONCE):
        piece = flat[start : start + _AT_ONCE]
        some, largest_of = bnb.quantize_4bit.default(piece, BLOCK, "nf4", torch.uint8)
        codes[start // 2 :][: len(some)], absmax[start // BLOCK :][: len(largest_of)] = some, largest_of
    offset = absmax.mean()
    small, state = quantize_blockwise(absmax - offset, blocksize=_BLOCK_OF_SCALES)
    parts = {"codes": codes, "absmax": small, "offset": offset, "scale": state.absmax, "table": state.code}
    return NF4(parts, weight.shape, weight.dtype)


def _operations():  # type: ignore[no-untyped-def]  # torch.ops has no types
    import bitsandbytes  # noqa: F401  registers them

    return torch.ops.bitsandbytes
