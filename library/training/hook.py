"""Hooks: actions beside the steps of a run. A hook is a class with a method for every moment of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

if TYPE_CHECKING:
    from library.data.dataset import Batch
    from library.record.validation_history import Validation
    from library.training.divergence import Diverged
    from library.training.step import BatchLoss

StateDict: TypeAlias = Mapping[str, Any]
"""A part of a saved state: tables of tensors, numbers and text. The reader checks it."""

R = TypeVar("R")  # library.training.run.Run; a type parameter, because run.py imports this file


@dataclass
class Step:
    """One step of the optimizer. Values that are not known yet have their default.

    `gradient_norm`: of all gradients together, before clipping; None if the step was skipped.
    """

    number: int  # counted from 1 over the whole run
    epoch: int  # counted from 0
    loss: float = math.nan  # mean of all batches of the step, before it
    gradient_norm: float | None = None
    rates: dict[str, float] = field(default_factory=dict)  # learning rates of this step, by group of parameters
    was_skipped: bool = False  # by the scaler of fp16 losses: the weights are as they were


class Hook(Generic[R]):
    """Base of all hooks: every moment does nothing. The loop calls a run's hooks in their order, on every process.

    `name` is the key of the hook's part of a saved state; no two hooks of a run have the same.
    """

    name: str = ""

    # -- the run

    def before_training(self, run: R) -> None:
        """Once, before the first step of this process; `run.position.done` steps were made by earlier ones."""

    def resumed(self, run: R) -> None:
        """Once, after the state to resume from is loaded."""

    def end(self, run: R, *, stopped_by: str, conclusion: str) -> None:
        """Training is over, and files are written. `stopped_by`: a signal's name or "an error", "" for neither;
        `conclusion`: a sentence of the validations, "" for none."""

    # -- a step

    def start_epoch(self, run: R, epoch: int) -> None:
        """Before the first step of an epoch (counted from 0), or the first after a resume within it."""

    def before_batch(self, run: R, batch: Batch) -> None:
        """Before the forward pass of a batch."""

    def after_batch(self, run: R, batch: Batch, found: BatchLoss) -> None:
        """After the forward pass of a batch, before its backward pass."""

    def after_backward(self, run: R, step: Step) -> None:
        """The gradients of the step are complete, the mean over all processes, not clipped; in fp16 still scaled."""

    def before_step(self, run: R, step: Step) -> None:
        """Loss and gradients are finite, the gradients clipped; the optimizer steps next."""

    def after_step(self, run: R, step: Step) -> None:
        """The weights are updated, unless `step.was_skipped`; the gradients are deleted."""

    def report(self, run: R, step: Step) -> Mapping[str, float]:
        """After every step, skipped ones included: numbers for the trackers, by the names of their curves."""
        return {}

    def end_of_step(self, run: R, step: Step) -> bool:
        """After the report; optimizers that average now have the average as weights. True ends the training here."""
        return False

    def noted(self, run: R, step: int, values: Mapping[str, Any]) -> None:
        """Another hook has measured something after `step` steps: a line of the metrics, as `record.metrics` has it."""

    # -- files

    def validated(self, run: R, result: Validation, *, best: bool) -> None:
        """The validation loss was measured; `best`: it is the lowest so far."""

    def save(self, run: R, step: int, *, last: bool) -> None:
        """After every step: write the files that are due. `last`: training ends early with this step."""

    def save_now(self, run: R, step: int) -> None:
        """Training is aborted after `step` steps: save a state that can be resumed."""

    def weights_for(self, run: R, purpose: str) -> AbstractContextManager[None]:
        """A context in which the network has the weights to "validate", "sample" or "save"."""
        return nullcontext()

    # -- a loss or gradient that is not finite: no weight has changed yet

    def skip(self, run: R, problem: Diverged) -> bool:
        """Skip the step. False: this hook does not."""
        return False

    def put_back(self, run: R, problem: Diverged) -> bool:
        """Roll the run back by some steps. False: this hook does not; the run ends unless another hook does."""
        return False

    def diverged(self, run: R, step: int, why: str) -> None:
        """Step `step` was skipped, or ends the run."""

    def rolled_back(self, run: R, step: int, why: str) -> None:
        """The run was rolled back to its state after `step` steps."""

    # -- the state

    def state_dict(self) -> StateDict:
        """The values that a resumed run needs: tensors and plain values only. Always empty, or never."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Continue from this state. Raises ValueError (or any error of reading a wrong table) if it does not fit."""

    def adopt(self, state: StateDict | None, *, step: int) -> bool:
        """Continue at `step` with this run's settings, which differ from the state's (--resume_anyway). Called before
        the optimizer's state is loaded. `state`: None if it has no part of this hook. False: use `load_state_dict`."""
        return False
