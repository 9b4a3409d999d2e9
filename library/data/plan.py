"""The order of training: the batches of an epoch, and their split into optimizer steps, micro steps and processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from library.data.samples import Size
from library.rng import python_random

T = TypeVar("T")

PlannedBatch = tuple[tuple[int, int], ...]
"""(index of the sample, repeat) of each member, all of one bucket."""


@dataclass(frozen=True)
class Group:
    """One bucket of one data set: the samples that may be batched together."""

    dataset: int
    size: Size
    batch_size: int
    members: tuple[tuple[int, float], ...]
    """(index of the sample, draws in an epoch): its repeats, or, where shares decide, their mean over all epochs."""
    in_first_epoch: int | None = None
    """Where shares decide: the batches of the first epoch. Later ones may have one more or less of this bucket."""

    @property
    def draws(self) -> int:
        """In an epoch, the first one where shares decide."""
        if self.in_first_epoch is not None:
            return self.in_first_epoch * self.batch_size
        return sum(int(repeats) for _, repeats in self.members)

    @property
    def batches(self) -> int:
        """The number of batches of an epoch; the last may be short, unless shares decide."""
        return -(-self.draws // self.batch_size)

    @property
    def largest_batch(self) -> int:
        """The number of images of its largest batch."""
        return self.batch_size if self.in_first_epoch is not None else min(self.batch_size, self.draws)

    def example(self) -> PlannedBatch:
        """A batch of the largest size, of the first images."""
        if self.in_first_epoch is not None:
            return tuple(
                (self.members[i % len(self.members)][0], i // len(self.members)) for i in range(self.batch_size)
            )
        draws = ((sample, repeat) for sample, repeats in self.members for repeat in range(int(repeats)))
        return tuple(islice(draws, self.batch_size))


def epoch_batches(
    groups: Sequence[Group], *, seed: int, epoch: int, by_shares: Iterable[PlannedBatch] = ()
) -> list[PlannedBatch]:
    """Every (sample, repeat) once, in the order of this epoch. The last batch of a bucket may be short.

    `by_shares`: this epoch's batches of the data sets that are drawn by shares, which take the place of their groups.
    """
    batches = list(by_shares)
    for group in groups:
        if group.in_first_epoch is not None:
            continue
        draws = [(sample, repeat) for sample, repeats in group.members for repeat in range(int(repeats))]
        python_random(seed, epoch, group.dataset, *group.size, "order").shuffle(draws)
        batches += [tuple(draws[i : i + group.batch_size]) for i in range(0, len(draws), group.batch_size)]
    python_random(seed, epoch, "batches").shuffle(batches)
    return batches


def split_into_steps(batches: Sequence[T], *, world_size: int, accumulation: int) -> list[list[list[T | None]]]:
    """Optimizer steps → micro steps → processes → batch.

    Step s, micro step k, process r gets batch number (s · accumulation + k) · world_size + r: a step has the same
    batches however `world_size` · `accumulation` is shared out. The last step is padded with None, so that all
    processes have equally many steps and micro steps.
    """
    per_step = world_size * accumulation
    filled: list[T | None] = [*batches, *[None] * (-len(batches) % per_step)]
    return [
        [filled[k : k + world_size] for k in range(start, start + per_step, world_size)]
        for start in range(0, len(filled), per_step)
    ]


def of_rank(steps: Sequence[Sequence[Sequence[T | None]]], rank: int) -> list[T]:
    """The batches that one process loads for these steps, in order, without the padding."""
    return [batch for step in steps for micro in step if (batch := micro[rank]) is not None]
