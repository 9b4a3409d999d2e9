"""Sizes of a model from the names and shapes in its file, where no configuration lies beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from library.errors import UserError
from library.files.tensors import TensorEntry


def shape_of(entries: Mapping[str, TensorEntry], name: str, path: str) -> tuple[int, ...]:
    """The shape of a tensor that every such model has. UserError for a file, `path`, without it."""
    entry = entries.get(name)
    if entry is None or not entry.shape:
        raise UserError(f"{path}: has no '{name}', which this model has; it is incomplete or of another kind")
    return entry.shape


def count_of(entries: Mapping[str, TensorEntry], blocks: str) -> int:
    """The number of blocks, from their numbers in names that begin with this pattern."""
    found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in entries)
    return 1 + max((int(match[1]) for match in found if match), default=-1)
