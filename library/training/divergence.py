"""A loss or a gradient that is not finite, named with its images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Diverged(Exception):
    """The loss or the gradient of step `step` is not finite; the message says which, and of which images.

    Every process raises it in the same step, since all have the sum of the losses and of the gradients. `advice`: for
    the user, if the run ends with it.
    """

    advice = "A lower --learning_rate is the usual cure; --on_divergence skip or rollback lets a run continue"

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what}")
        self.step = step


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number in them is NaN or infinite."""
    found = [tensor.isfinite().all() for tensor in tensors]
    return not found or bool(torch.stack(found).all())


def named(step: int, losses: Sequence[float], images: Sequence[Sequence[str]]) -> Diverged:
    """The error of a step, from the loss and the images (their paths) of each batch of all processes."""
    bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    if not bad:
        together = [path for paths in images for path in paths]
        return Diverged(step, f"the gradient is not finite, of {_listed(together)}")
    where = f" in batch {bad[0] + 1} of {len(losses)}" if len(losses) > 1 else ""
    kind = "NaN" if math.isnan(losses[bad[0]]) else "infinite"
    return Diverged(step, f"the loss is {kind}{where}, of {_listed(images[bad[0]])}")


def _listed(paths: Sequence[str], most: int = 8) -> str:
    distinct = list(dict.fromkeys(paths))
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return ", ".join(distinct[:most]) + more
