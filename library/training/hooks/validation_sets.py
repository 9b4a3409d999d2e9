"""Measures further images at each validation: named sets, and trained images for the gap between the two."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from library.data.dataset import TrainingData
from library.out_of_memory import during
from library.record import trackers
from library.record.forgetting import ByTimestep, mean, rate
from library.record.validation_history import Validation
from library.training.hook import Hook, StateDict
from library.training.hooks.validation import measure
from library.training.run import Run

logger = logging.getLogger(__name__)


class ValidationSets(Hook[Run]):
    """Every set has a curve of its own. None of them decides which step is the best, or when to stop."""

    name = "validation_sets"

    def __init__(
        self,
        sets: Mapping[str, TrainingData],
        trained: TrainingData | None,
        *,
        timesteps: Sequence[int],
        most_batches: int | None,
    ) -> None:
        """`sets` by name. `trained`: images of the training data, for the gap; None measures none."""
        self.sets, self.trained = sets, trained
        self._timesteps, self._most_batches = timesteps, most_batches
        self._best: dict[str, tuple[float, int]] = {}  # the lowest after a step, and that step
        self._first_gap: float | None = None

    @property
    def data(self) -> list[TrainingData]:
        return [*self.sets.values(), *([] if self.trained is None else [self.trained])]

    def validated(self, run: Run, result: Validation, *, best: bool) -> None:
        values: dict[str, Any] = {}
        with during(f"validation after step {result.step}", done=result.step):
            for name, data in self.sets.items():
                values[name] = self._measured(run, name, data, result.step)
            if values:
                lines = {name: {"loss": mean(one), **_by_name(one)} for name, one in values.items()}
                _note(run, result.step, {"validation_sets": lines})
            if self.trained is not None:
                self._gap(run, result, self._losses(run, self.trained))
        tracked = {f"loss/validation_{name}": mean(one) for name, one in values.items()}
        trackers.tell(run.accelerator, tracked, step=result.step)

    def _measured(self, run: Run, name: str, data: TrainingData, step: int) -> ByTimestep:
        found = self._losses(run, data)
        loss = mean(found)
        if step and loss < self._best.get(name, (float("inf"), 0))[0]:
            self._best[name] = (loss, step)
        parts = ", ".join(f"{value:.4f} at t {t}" for t, value in found.items())
        best = f"; best {self._best[name][0]:.4f} at step {self._best[name][1]}" if name in self._best else ""
        logger.info("validation on %s %s: %.4f (%s)%s", name, _moment(step), loss, parts, best)
        return found

    def _gap(self, run: Run, result: Validation, trained: ByTimestep) -> None:
        """The gap: (validation - trained) / trained. Before training it is that of two sets of images."""
        gap = rate(result.loss, mean(trained))
        if result.step == 0:
            self._first_gap = gap
        before = f" ({100 * self._first_gap:+.1f} % before training)" if self._first_gap is not None else ""
        logger.info(
            "gap %s: %+.1f %%%s; held-out images %.4f, trained ones with equal noise %.4f",
            *(_moment(result.step), 100 * gap, before if result.step else "", result.loss, mean(trained)),
        )
        parts = {f"t{t}": rate(result.by_timestep[t], loss) for t, loss in trained.items()}
        _note(run, result.step, {"gap": {"gap": gap, "trained": mean(trained), **parts}})
        trackers.tell(
            run.accelerator,
            {"loss/validation/gap": gap, "loss/validation/trained_images": mean(trained)},
            step=result.step,
        )

    def _losses(self, run: Run, data: TrainingData) -> ByTimestep:
        return measure(run, data, data.plan(0)[: self._most_batches], self._timesteps)

    def state_dict(self) -> StateDict:
        best = {name: list(one) for name, one in self._best.items()}
        return {"best": best, "first_gap": self._first_gap}

    def load_state_dict(self, state: StateDict) -> None:
        self._best = {name: (float(loss), int(step)) for name, (loss, step) in state["best"].items()}
        self._first_gap = state["first_gap"]


def _by_name(losses: ByTimestep) -> dict[str, float]:
    return {f"t{t}": loss for t, loss in losses.items()}


def _moment(step: int) -> str:
    return f"after {step} steps" if step else "before training"


def _note(run: Run, step: int, values: Mapping[str, Any]) -> None:
    for hook in run.hooks:
        hook.noted(run, step, values)
