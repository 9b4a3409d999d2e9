"""Sets the learning rates by their schedule."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch.optim.lr_scheduler import LRScheduler

from library.training.hook import Hook, StateDict, Step
from library.training.run import Run

if TYPE_CHECKING:
    from library.optimizers.schedules import ScheduleChoice


class LrSchedule(Hook[Run]):
    name = "schedule"

    def __init__(self, schedule: LRScheduler, choice: ScheduleChoice) -> None:
        self.schedule, self.choice = schedule, choice

    def after_step(self, run: Run, step: Step) -> None:
        if not step.was_skipped:
            self.schedule.step()

    def lower(self, factor: float) -> None:
        """Multiply all later rates; the caller multiplies those in the optimizer's groups."""
        bases = getattr(self.schedule, "base_lrs", None)
        if bases is not None:
            bases[:] = [rate * factor for rate in bases]

    def state_dict(self) -> StateDict:
        return self.schedule.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        self.schedule.load_state_dict(dict(state))

    def adopt(self, state: StateDict | None, *, step: int) -> bool:
        """Continue on this run's curve, at the state's step."""
        with warnings.catch_warnings():
            # these steps of the schedule are not preceded by steps of the optimizer
            warnings.filterwarnings(
                "ignore", "Detected call of `lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`"
            )
            for _ in range(step if state is None else state["last_epoch"]):
                self.schedule.step()
        return True
