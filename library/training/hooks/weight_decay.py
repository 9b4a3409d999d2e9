"""Passes the losses to the optimizer's weight decay, which may depend on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from library.record.validation_history import History
from library.training.hook import Hook, Step
from library.training.run import Run

if TYPE_CHECKING:
    from library.optimizers.weight_decay_choice import DecayChoice

Observe = Callable[[float, float | None, float | None], None]
"""Receives the loss, the gradient's norm and, if it is new, the validation loss."""


class WeightDecay(Hook[Run]):
    """Has no state: the optimizer sets the weight decay in each step and keeps the curve's state in its groups."""

    name = "weight_decay"

    def __init__(
        self,
        decay: DecayChoice,
        observe: Observe | None,
        history: History | None,
    ) -> None:
        """`observe`: None for a curve that does not depend on losses. `history`: of the validations."""
        self.decay, self._observe, self._history = decay, observe, history

    def before_step(self, run: Run, step: Step) -> None:
        norm = step.gradient_norm
        if self._observe is not None and norm is not None and math.isfinite(norm):
            validated = None if self._history is None else self._history.loss_after(step.number - 1)
            self._observe(step.loss, norm, validated)
