"""Renders samples during training."""

from __future__ import annotations

from library.errors import UserError
from library.out_of_memory import during
from library.sampling.render import Sampling
from library.training.hook import Hook
from library.training.run import Run
from library.training.unwritten import Unwritten


class Sampler(Hook[Run]):
    """On the main process. Comes after the saver: files are written before pictures."""

    name = "sampler"

    def __init__(self, sampling: Sampling, unwritten: Unwritten) -> None:
        self._sampling, self._unwritten = sampling, unwritten

    def before_training(self, run: Run) -> None:
        if run.position.done == 0:
            with during("rendering samples before training", done=0), run.weights_for("sample"):
                self._sampling(0)

    def save(self, run: Run, step: int, *, last: bool) -> None:
        if not self._sampling.is_due(step):
            return
        try:
            with during(f"rendering samples after step {step}", done=step), run.weights_for("sample"):
                self._sampling(step)
        except UserError as error:
            self._unwritten.put_up_with(error)
