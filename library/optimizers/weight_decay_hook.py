"""A weight decay that changes with the steps, for optimizers without one of their own."""

from __future__ import annotations

import logging

import torch

from library.errors import UserError
from library.optimizers.plateau import Plateau
from library.optimizers.weight_decay import VANISHED, Curve
from library.optimizers.weight_decay_pace import STEADY, Pace

logger = logging.getLogger(__name__)


class WeightDecayHook:
    """Sets the weight decay of every group before each step of an optimizer.

    Its state is in the groups ("initial_weight_decay", "wd_step", "wd_flat_since" and, in the first, "wd_seen"), so
    that it is part of the optimizer's state dict. A step that a gradient scaler skips is not counted.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, curve: Curve, plateau: Plateau, pace: Pace = STEADY) -> None:
        """`plateau` is read by the adaptive curve. Raises UserError for an optimizer without a weight decay."""
        if any("weight_decay" not in group for group in optimizer.param_groups):
            raise UserError(f"--dynamic_weight_decay: {type(optimizer).__name__} has no weight_decay to change")
        self.optimizer, self.curve, self.plateau, self.pace = optimizer, curve, plateau, pace
        self._warned = False
        optimizer.register_step_pre_hook(self._before_step)

    def observe(self, loss: float, gradient_norm: float | None = None, validation_loss: float | None = None) -> None:
        """Observe a loss for the adaptive curve; to be called before each step."""
        self.plateau.tell(
            self.optimizer.param_groups,
            counter="wd_step",
            loss=loss,
            gradient_norm=gradient_norm,
            validation_loss=validation_loss,
        )

    def _before_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for group in optimizer.param_groups:
            base = group.setdefault("initial_weight_decay", group["weight_decay"])
            step = group["wd_step"] = group.get("wd_step", 0) + 1
            group["weight_decay"] = base * self.pace.factor(group, self.curve, step)
            if base > 0 and group["weight_decay"] < VANISHED and not self._warned:
                logger.warning("the weight decay has fallen below %g: nothing is regularised any more", VANISHED)
                self._warned = True
