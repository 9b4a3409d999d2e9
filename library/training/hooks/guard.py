"""A loss or a gradient that is no number: found before the optimizer sees it, named with its images, and dealt with."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from library.training import state

if TYPE_CHECKING:
    from torch import Tensor

    from library.training.loop import Run

logger = logging.getLogger(__name__)

LOWER = 0.5
"""What a rollback multiplies every learning rate by."""


class Diverged(Exception):
    """Step `step` gave a loss or a gradient that is no finite number; the message says which, of what images.

    Every process raises it in the same step, since all have the sum of the losses and of the gradients.
    """

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what}")
        self.step = step


@dataclass
class Guard:
    """What a run does when it diverges, and how it stood where it can go back to.

    `count`: how often it has skipped a step or gone back, of `limit` times that it may. `keeps_after`: whether to
    remember how the run stands after so many steps.
    """

    action: Literal["stop", "skip", "rollback"]
    limit: int
    keeps_after: Callable[[int], bool]
    count: int = 0
    _kept: tuple[int, dict[str, Any]] | None = field(default=None, repr=False)
    _lower: float = 1.0  # than the rates of what is kept

    def keep(self, run: Run, step: int) -> None:
        """Remember how the run stands after `step` steps, for a rollback: as large as a saved state."""
        if self.action == "rollback" and is_finite(run.parameters):
            self._kept = step, copy.deepcopy(state.tensors_of(run))
            self._lower = 1.0

    def skip(self, run: Run, problem: Diverged) -> bool:
        """Leave the step out; False if this is not wanted, or no longer."""
        if self.action != "skip" or self.count >= self.limit:
            return False
        self.count += 1
        run.optimizer.zero_grad(set_to_none=True)
        logger.warning("%s. The step is skipped (%d of %d that may be)", problem, self.count, self.limit)
        return True

    def roll_back(self, run: Run, problem: Diverged) -> bool:
        """Put the run where it was last kept, with lower rates; False if this is not wanted, or no longer."""
        if self.action != "rollback" or self.count >= self.limit or self._kept is None:
            return False
        self.count += 1
        run.optimizer.zero_grad(set_to_none=True)
        run.done, tensors = self._kept
        self._lower *= LOWER
        state.put(run, copy.deepcopy(tensors), "rollback")
        lower_rates(run, self._lower)
        logger.warning(
            "%s. Back to step %d, with its learning rates times %g (%d of %d times that this may happen)",
            *(problem, run.done, self._lower, self.count, self.limit),
        )
        return True

    def ending(self) -> str:
        """Why it does not go on, and what helps."""
        cure = "a lower --learning_rate is the usual cure"
        if self.count:
            return f"That was once more than --divergence_limit {self.limit} allows; {cure}"
        return f"{cure[0].upper()}{cure[1:]}; --on_divergence skip or rollback goes on"


def is_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether no weight is NaN or infinite."""
    found = [parameter.isfinite().all() for parameter in parameters]
    return not found or bool(torch.stack(found).all())


def lower_rates(run: Run, factor: float) -> None:
    """Multiply the rate of every group, now and in all that the schedule has still to come."""
    for group in run.optimizer.param_groups:
        for name in ("lr", "initial_lr", "max_lr", "min_lr"):  # the last two are OneCycleLR's
            if name in group:
                group[name] = group[name] * factor
    bases = getattr(run.schedule, "base_lrs", None)
    if bases is not None:
        bases[:] = [rate * factor for rate in bases]


def named(step: int, losses: Sequence[float], images: Sequence[Sequence[str]]) -> Diverged:
    """What is wrong with a step, from the loss and the images (their paths) of each batch of all processes."""
    bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    if not bad:
        together = [path for paths in images for path in paths]
        return Diverged(step, f"the gradient is no finite number, of {_listed(together)}")
    where = f" in batch {bad[0] + 1} of {len(losses)}" if len(losses) > 1 else ""
    kind = "NaN" if math.isnan(losses[bad[0]]) else "infinite"
    return Diverged(step, f"the loss is {kind}{where}, of {_listed(images[bad[0]])}")


def _listed(paths: Sequence[str], most: int = 8) -> str:
    distinct = list(dict.fromkeys(paths))
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return ", ".join(distinct[:most]) + more
