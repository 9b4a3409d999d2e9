"""--on_divergence: on a loss or gradient that is not finite the run ends, skips the step, or is rolled back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, Literal

from library.training import snapshot
from library.training.divergence import Diverged, is_finite
from library.training.hook import Hook, StateDict
from library.training.hooks.lr_schedule import LrSchedule
from library.training.run import Run

logger = logging.getLogger(__name__)

LOWER = 0.5
"""A rollback multiplies every learning rate by this."""


class Guard(Hook[Run]):
    """Comes after all hooks that save: its snapshot for a rollback has the same contents as a saved state.

    `count`: the number of skipped steps or rollbacks so far.
    """

    name = "divergences"

    def __init__(
        self, action: Literal["stop", "skip", "rollback"], *, limit: int, keeps_after: Callable[[int], bool]
    ) -> None:
        """`limit`: of `count`. `keeps_after`: whether to take a snapshot after this many steps."""
        self._action, self._limit, self._keeps_after = action, limit, keeps_after
        self.count = 0
        self._kept: tuple[int, dict[str, Any]] | None = None
        self._lower = 1.0  # the factor on the rates since the snapshot

    def before_training(self, run: Run) -> None:
        self._keep(run, run.position.done)

    def save(self, run: Run, step: int, *, last: bool) -> None:
        if not last and self._keeps_after(step):
            self._keep(run, step)

    def _keep(self, run: Run, step: int) -> None:
        """Take a snapshot of the run after `step` steps; it is as large as a saved state."""
        if self._action == "rollback" and is_finite(run.parameters):
            self._kept = step, copy.deepcopy(snapshot.tensors_of(run))
            self._lower = 1.0

    def skip(self, run: Run, problem: Diverged) -> bool:
        if self._action != "skip" or self._is_over(problem):
            return False
        self.count += 1
        run.optimizer.zero_grad(set_to_none=True)
        logger.warning("%s. The step is skipped (%d of at most %d)", problem, self.count, self._limit)
        return True

    def put_back(self, run: Run, problem: Diverged) -> bool:
        """Roll back to the snapshot, with lower rates."""
        if self._action != "rollback" or self._is_over(problem) or self._kept is None:
            return False
        count = self.count + 1
        run.optimizer.zero_grad(set_to_none=True)
        run.position.done, tensors = self._kept
        self._lower *= LOWER
        snapshot.put(run, copy.deepcopy(tensors), "rollback")
        self.count = count
        lower_rates(run, self._lower)
        logger.warning(
            "%s. Rolled back to step %d, with its learning rates times %g (%d of at most %d rollbacks)",
            *(problem, run.position.done, self._lower, self.count, self._limit),
        )
        return True

    def _is_over(self, problem: Diverged) -> bool:
        """Whether the limit is exceeded; the problem's message then says so."""
        if self.count < self._limit:
            return False
        if self.count:
            problem.advice = (
                f"That was once more than --divergence_limit {self._limit} allows; "
                "a lower --learning_rate is the usual cure"
            )
        return True

    def state_dict(self) -> StateDict:
        return {"count": self.count}

    def load_state_dict(self, state: StateDict) -> None:
        """Raises ValueError for an invalid count."""
        count = state["count"]
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"its count is {str(count)[:50]!r}")
        self.count = count


def lower_rates(run: Run, factor: float) -> None:
    """Multiply the rate of every group, now and in the rest of the schedule."""
    for group in run.optimizer.param_groups:
        for name in ("lr", "initial_lr", "max_lr", "min_lr"):  # the last two are OneCycleLR's
            if name in group:
                group[name] = group[name] * factor
    if (schedule := run.hook(LrSchedule)) is not None:
        schedule.lower(factor)
