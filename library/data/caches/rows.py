"""Stacks rows of a cache whose length differs from caption to caption."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """[B, …]. Rows whose first axis is shorter than the longest row's end in zeros.

    A family whose text encoders return as many states as a caption has tokens therefore caches a mask beside them, in
    which the zeros mark padding.
    """
    if len({row.shape for row in rows}) == 1:
        return torch.stack(list(rows))
    length = max(len(row) for row in rows)
    padded = rows[0].new_zeros((len(rows), length, *rows[0].shape[1:]))
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded
