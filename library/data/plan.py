"""The order of training: the batches of an epoch, and their split into optimizer steps, micro steps and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    members: tuple[tuple[int, int], ...]
    """(index of the sample, number of repeats)."""

    @property
    def draws(self) -> int:
        return sum(repeats for _, repeats in self.members)

    @property
    def batches(self) -> int:
        """The number of batches of an epoch; the last may be short."""
        return -(-self.draws // self.batch_size)


def epoch_batches(groups: Sequence[Group], *, seed: int, epoch: int) -> list[PlannedBatch]:
    """Every (sample, repeat) once, in the order of this epoch. The last batch of a bucket may be short."""
    batches: list[PlannedBatch] = []
    for group in groups:
        draws = [(sample, repeat) for sample, repeats in group.members for repeat in range(repeats)]
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
