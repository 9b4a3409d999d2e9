"""Optimizers with an accident in their third step, for `--optimizer_type tests.yardstick.stumbling.…`.

They count the steps of the process, not those of the run: after a rollback, and in a resumed run, nothing happens.
Nor does anything while the trainer tries the class on its small LoRA, which has fewer weights than any case trains.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

LEAST = 50_000  # weights of a run; the trainer's trial has 6,000 for each group, the cases' LoRA 140,000


class Accident(torch.optim.AdamW):
    steps = 0  # of this process

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.01) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def step(self, closure: Any = None) -> Any:
        done = super().step(closure)
        if sum(weight.numel() for group in self.param_groups for weight in group["params"]) >= LEAST:
            Accident.steps += 1
            if Accident.steps == 3:
                self.happens()
        return done

    def happens(self) -> None:
        raise NotImplementedError


class NotANumber(Accident):
    """Its third step makes the first parameter NaN."""

    def happens(self) -> None:
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))


class CtrlC(Accident):
    """The user presses Ctrl-C in its third step."""

    def happens(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
