"""Draws by shares: which images of a data set an epoch has, where `share`, `balance` or `reg_share` decides.

An epoch is a fixed number of batches, all of them full. The batches are dealt out to the buckets, the places in a
bucket's batches to the folders with images there, and those of a folder to its images in rounds: each image once, in a
new order in each round. The dealing goes on from epoch to epoch, so that over a run the images of a folder are drawn
equally often, whatever their buckets: a folder whose share asks for less than all of it shows others in each epoch, and
one whose share asks for more begins again. A draw depends on the seed and its place alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from library.data.buckets import Placement
from library.data.plan import Group, PlannedBatch
from library.data.samples import Sample, Size
from library.rng import python_random

if TYPE_CHECKING:
    from library.config.data.dataset_config import SubsetSpec

Shares = tuple[int, "Mapping[SubsetSpec, float]"]
"""The draws of an epoch, in full batches, and each folder's part of them."""

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Pool:
    """The images of one folder in one bucket. `number`: of the folder in its data set. `part`: of the draws."""

    number: int
    part: float
    members: tuple[int, ...]


@dataclass(frozen=True)
class Mix:
    """The draws of one data set. `batches`: of an epoch. `buckets`: each with its folders' images."""

    dataset: int
    batch_size: int
    batches: int
    buckets: tuple[tuple[Size, tuple[Pool, ...]], ...]

    def epoch(self, *, seed: int, epoch: int) -> list[PlannedBatch]:
        """The batches of an epoch, not yet shuffled. The repeat of a draw is its round, counted over the run."""
        rounds: dict[tuple[int, ...], list[int]] = {}

        def draw(bucket: int, place: int) -> tuple[int, int]:
            size, pools = self.buckets[bucket]
            which, own = turn(place, ratios(tuple(pool.part for pool in pools)))
            pool = pools[which]
            number, index = divmod(own, len(pool.members))
            key = *size, pool.number, number
            if key not in rounds:
                rounds[key] = list(pool.members)
                python_random(seed, self.dataset, *key, "share").shuffle(rounds[key])
            return rounds[key][index], number

        return [
            tuple(draw(bucket, number * self.batch_size + i) for i in range(self.batch_size))
            for bucket, number in self._turns(epoch)
        ]

    def groups(self) -> Iterator[Group]:
        """Each bucket, with its batches in the first epoch and the mean draws of each image in any."""
        first = [bucket for bucket, _ in self._turns(0)]
        for bucket, (size, pools) in enumerate(self.buckets):
            members = [
                (index, self.batches * self.batch_size * pool.part / len(pool.members))
                for pool in pools
                for index in pool.members
            ]
            yield Group(self.dataset, size, self.batch_size, tuple(sorted(members)), in_first_epoch=first.count(bucket))

    def _turns(self, epoch: int) -> Iterator[tuple[int, int]]:
        """(bucket, which of its batches over the run) of each batch of an epoch."""
        shares = ratios(tuple(math.fsum(pool.part for pool in pools) for _, pools in self.buckets))
        return (turn(place, shares) for place in range(epoch * self.batches, (epoch + 1) * self.batches))


def mix(
    dataset: int,
    batch_size: int,
    samples: Sequence[Sample],
    placements: Sequence[Placement],
    shares: Shares,
    *,
    first: int,
) -> Mix:
    """The draws of a data set of these samples; the index of the first is `first`."""
    draws, share = shares
    numbers = {subset: number for number, subset in enumerate(share)}
    found: dict[Size, dict[SubsetSpec, list[int]]] = {}
    for index, (sample, placement) in enumerate(zip(samples, placements, strict=True), start=first):
        if sample.subset in share:
            found.setdefault(placement.bucket, {}).setdefault(sample.subset, []).append(index)
    counts = {subset: sum(len(of_bucket.get(subset, ())) for of_bucket in found.values()) for subset in share}
    buckets = tuple(
        (
            size,
            tuple(
                Pool(numbers[subset], share[subset] * len(members) / counts[subset], tuple(members))
                for subset, members in of_bucket.items()
            ),
        )
        for size, of_bucket in sorted(found.items())
    )
    return Mix(dataset, batch_size, draws // batch_size, buckets)


@lru_cache
def ratios(parts: tuple[float, ...]) -> tuple[float, ...]:
    """Each part of what it and those behind it have together."""
    return tuple(part / math.fsum(parts[index:]) for index, part in enumerate(parts))


def turn(place: int, shares: Sequence[float]) -> tuple[int, int]:
    """Whose turn a place of an endless row is, and which of its turns, counted from 0. `shares`: see `ratios`.

    The first takes its places evenly spaced, the next the same of those that are left, and so on. Each begins at
    another point, so that rare ones do not all come together.
    """
    for index, share in enumerate(shares):
        start = (index + 1) * _GOLDEN % 1
        before = math.floor(place * share + start)
        if math.floor((place + 1) * share + start) > before:
            return index, before
        place -= before
    raise AssertionError("the last has all that is left")
