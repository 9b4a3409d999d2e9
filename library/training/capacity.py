"""Decides whether a network may be full: training no longer gains, and held-out images show no overfitting.

A single step's loss of a diffusion model depends more on the noise level drawn than on learning, so the rule takes
means of whole epochs, with their standard errors: short epochs say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

EPOCHS = 4  # in a row that are compared
FALL = 0.02  # of the loss, in an epoch


class Epoch(NamedTuple):
    """The training losses of an epoch: their mean, its standard error, and the last step."""

    mean: float
    error: float
    last_step: int


def is_full(epochs: Sequence[Epoch], validation: Iterable[tuple[float, float]], *, fall: float = FALL) -> bool:
    """Whether in the last `EPOCHS` epochs the training loss fell by less than `fall` of itself an epoch, in spite of
    its error, and the validation loss by less than `fall` in all of them, without rising by as much.

    The fall is the slope of a straight line through the means. `validation`: (step, loss). A training loss that rises
    as fast is something else. Needs a validation in the first of these epochs or before, and two after that.
    """
    if len(epochs) < EPOCHS:
        return False
    epochs = epochs[-EPOCHS:]
    places = [place - (EPOCHS - 1) / 2 for place in range(EPOCHS)]
    spread, level = math.fsum(place**2 for place in places), math.fsum(epoch.mean for epoch in epochs) / EPOCHS
    slope = math.fsum(place * epoch.mean for place, epoch in zip(places, epochs, strict=True)) / spread
    error = (
        math.sqrt(math.fsum((place * epoch.error) ** 2 for place, epoch in zip(places, epochs, strict=True))) / spread
    )
    if not (level > 0 and -fall < -slope / level < fall - error / level):
        return False
    before: list[float] = []
    since: list[float] = []
    for step, loss in validation:
        (before if step <= epochs[0].last_step else since).append(loss)
    if not before or len(since) < 2:
        return False
    best = min(before)
    return min(since) > best * (1 - fall) and since[-1] < min(best, *since) * (1 + fall)


class Epochs:
    """Collects the losses of the last epochs, in constant memory."""

    def __init__(self) -> None:
        self._seen: dict[int, list[float]] = {}  # epoch → number, sum and sum of squares of its losses, last step

    def add(self, step: int, *, epoch: int, loss: float) -> None:
        """Add the loss of a step; one that is not finite, that of a skipped step, is ignored."""
        if not math.isfinite(loss):
            return
        found = self._seen.setdefault(epoch, [0, 0.0, 0.0, 0])
        found[:] = [found[0] + 1, found[1] + loss, found[2] + loss * loss, step]
        while len(self._seen) > EPOCHS + 1:
            del self._seen[next(iter(self._seen))]

    def whole(self) -> list[Epoch]:
        """The epochs that are over: all but the last, and that too once it has as many steps as the one before."""
        numbers = list(self._seen.values())
        over = numbers if len(numbers) > 1 and numbers[-1][0] >= numbers[-2][0] else numbers[:-1]
        return [_epoch(*found) for found in over if found[0] > 1]


def _epoch(count: float, total: float, squares: float, step: float) -> Epoch:
    mean = total / count
    variance = max(squares / count - mean * mean, 0.0) * count / (count - 1)
    return Epoch(mean, math.sqrt(variance / count), int(step))
