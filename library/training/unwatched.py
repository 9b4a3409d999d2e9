"""What stands in the place of `monitor.Monitor` where a run is not watched, so that the loop need not ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Unwatched:
    """What it is told goes nowhere. The methods are described in `Monitor`."""

    def batch(self, per_sample_B: Tensor, t_B: Tensor) -> None: ...

    def before_step(self, step: int, *, gradient_norm: float) -> None: ...

    def after_step(self, step: int) -> None: ...

    def report(
        self, step: int, *, epoch: int, loss: float, average: float, rates: Mapping[str, float]
    ) -> dict[str, Any]:
        return {}

    def validation(self, step: int, losses: Mapping[str, float], *, loss: float) -> None: ...

    def go_back(self, step: int, *, why: str) -> None: ...

    def diverged(self, step: int, why: str) -> None: ...

    def end(self, *, stopped_by: str, conclusion: str) -> None: ...
