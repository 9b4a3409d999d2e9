"""Sets how much of the run is done in the loss terms whose weight depends on it."""

from __future__ import annotations

from collections.abc import Sequence

from library.losses.distillation import Distillation
from library.training.hook import Hook, Step
from library.training.run import Run


class Progress(Hook[Run]):
    """A function of the step alone, so it needs no state."""

    name = "progress"

    def __init__(self, terms: Sequence[Distillation]) -> None:
        self._terms = terms

    def before_training(self, run: Run) -> None:
        self._set(run, run.position.done)

    def after_step(self, run: Run, step: Step) -> None:
        self._set(run, step.number)

    def rolled_back(self, run: Run, step: int, why: str) -> None:
        self._set(run, step)

    def _set(self, run: Run, done: int) -> None:
        for term in self._terms:
            term.done = done / run.position.total
