"""Groups of images that look nearly alike, by their signatures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from library.data.quality.look import UNIT
from library.progress import bar

NEAR = 0.99  # the least correlation of near-duplicates
ALIKE = 0.9  # and of neighbours in a series, which their names show as well
BLOCK = 1024  # rows of the matrix of correlations at one time: 40 MB for 10,000 images


def near_groups(signatures: np.ndarray, *, least: float = NEAR) -> list[list[int]]:
    """The groups of at least two images of which each correlates with another one of the group by `least` or more.

    signatures: [N, 192] as of `look.signature`. Members and groups are in ascending order. All pairs are compared, as
    products of matrices, which are exact: the groups are the same on every machine.
    """
    number = len(signatures)
    signatures = signatures.astype(np.float32)
    group = np.arange(number)
    starts = range(0, number, BLOCK)
    for start in bar(starts, desc="near-duplicates", total=len(starts), unit="block"):
        correlations = signatures[start : start + BLOCK] @ signatures[start:].T
        for row, hits in _hits(correlations >= least * UNIT**2):
            same = np.unique(group[start + hits])
            if len(same) > 1:
                group[np.isin(group, same)] = group[start + row] = same[0]
    return _members(group)


def _hits(near: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each row with others beside itself, and the columns of all of them."""
    np.fill_diagonal(near, True)
    return [(int(row), np.flatnonzero(near[row])) for row in np.flatnonzero(near.sum(axis=1) > 1)]


def _members(group: np.ndarray) -> list[list[int]]:
    members: dict[int, list[int]] = {}
    for index, one in enumerate(group.tolist()):
        members.setdefault(one, []).append(index)
    return [found for found in members.values() if len(found) > 1]


def joined(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """The groups with those that share a member as one, in ascending order."""
    parent: dict[int, int] = {}

    def root(index: int) -> int:
        parent.setdefault(index, index)
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for first, *rest in groups:
        for other in rest:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    members: dict[int, list[int]] = {}
    for index in sorted(parent):
        members.setdefault(root(index), []).append(index)
    return list(members.values())
