"""The losses of a run in constant memory: the latest step by step, all of them as means over longer and longer
stretches.

NaN stands for a step that was skipped; means ignore it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from typing import Any

import torch

RECENT = 100  # steps that the moving average is over, as in kohya's progress bar
MOST = 4096  # points of the whole curve


class LossHistory:
    """`points[i]` is the mean loss of steps i * stretch + 1 … (i + 1) * stretch.

    The stretch is one step until there are `MOST` points; then neighbours are merged and it doubles.
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.points: list[float] = []
        self.stretch = 1
        self._begun: list[float] = []  # the losses of the stretch that is not full yet

    @property
    def average(self) -> float:
        """Mean of the last `RECENT` losses."""
        return _mean(self.recent)

    def curve(self) -> list[tuple[float, float]]:
        """(step, mean loss of the stretch around it)."""
        return [((i + 0.5) * self.stretch + 0.5, point) for i, point in enumerate(self.points)]

    def add(self, loss: float) -> None:
        """The loss of the next step."""
        self.recent.append(loss)
        self._begun.append(loss)
        if len(self._begun) < self.stretch:
            return
        self.points.append(_mean(self._begun))
        self._begun = []
        if len(self.points) == MOST:
            self.points = [_mean(pair) for pair in zip(self.points[::2], self.points[1::2], strict=True)]
            self.stretch *= 2

    def state_dict(self) -> dict[str, Any]:
        """For a run's state; `losses` are the points."""
        return {
            "losses": torch.tensor(self.points, dtype=torch.float64),
            "recent_losses": torch.tensor(list(self.recent), dtype=torch.float64),
            "begun_losses": torch.tensor(self._begun, dtype=torch.float64),
            "loss_stretch": self.stretch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict`, or that of an earlier version, which kept every loss: "losses" alone."""
        if "loss_stretch" not in state:
            self.__init__()  # type: ignore[misc]
            for loss in state["losses"].tolist():
                self.add(loss)
            return
        self.points = state["losses"].tolist()
        self.recent = deque(state["recent_losses"].tolist(), maxlen=RECENT)
        self._begun = state["begun_losses"].tolist()
        self.stretch = int(state["loss_stretch"])


def _mean(losses: Collection[float]) -> float:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return math.fsum(finite) / len(finite) if finite else math.nan
