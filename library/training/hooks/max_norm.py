"""--scale_weight_norms: adapters whose delta has grown too large are scaled down after each step."""

from __future__ import annotations

from library.training.hook import Hook, Step
from library.training.run import Run


class MaxNorm(Hook[Run]):
    name = "max_norm"

    def __init__(self, limit: float) -> None:
        """`limit`: of the Frobenius norm of an adapter's delta to its layer's weight."""
        self._limit = limit

    def after_step(self, run: Run, step: Step) -> None:
        run.network.limit_norms(self._limit)
