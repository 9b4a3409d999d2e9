"""Optimizers with an accident in their third step, for `--optimizer_type tests.yardstick.stumbling.…`.

They count the steps of the process, not those of the run: after a rollback, and in a resumed run, nothing happens.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch


class Accident(torch.optim.AdamW):
    steps = 0  # of this process

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.01) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def step(self, closure: Any = None) -> Any:
        done = super().step(closure)
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
