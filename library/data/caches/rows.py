"""Rows of a cache put one above the other, for what has a length of its own for each caption."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """[B, …]. Rows whose first axis is shorter than the longest row's end in zeros.

    So a family whose text encoders give as many states as a caption has tokens caches a mask beside them: there the
    zeros mean that nothing is to be read.
    """
    if len({row.shape for row in rows}) == 1:
        return torch.stack(list(rows))
    length = max(len(row) for row in rows)
    padded = rows[0].new_zeros((len(rows), length, *rows[0].shape[1:]))
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded
