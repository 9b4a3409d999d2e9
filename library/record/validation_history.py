"""The history of a run's validations: the best one, whether it is time to stop, and the conclusion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Validation:
    """The mean loss after `step` steps, and its parts by timestep."""

    step: int
    loss: float
    by_timestep: Mapping[int, float]


@dataclass
class History:
    """All validations so far, in order. They are the whole state: the rest is computed from them.

    `patience`: None never stops. `threshold`: the share of the best loss by which a lower one counts as improvement.
    The validation before the first step is only for comparison: it is never the best, and patience starts after it.
    """

    patience: int | None = None
    threshold: float = 0.0
    validations: list[Validation] = field(default_factory=list)

    @property
    def baseline(self) -> Validation | None:
        return next((one for one in self.validations if one.step == 0), None)

    @property
    def best(self) -> Validation | None:
        """The lowest after a step, the earliest of equals; losses that are NaN are ignored."""
        after = [one for one in self.validations if one.step > 0 and math.isfinite(one.loss)]
        return min(after, key=lambda one: one.loss, default=None)

    @property
    def without_improvement(self) -> int:
        """Validations since the last one that improved on the best by the threshold."""
        best, count = math.inf, 0
        for one in self.validations:
            if one.step == 0:
                continue
            if one.loss < best - self.threshold * abs(best) or (best == math.inf and math.isfinite(one.loss)):
                best, count = one.loss, 0
            else:
                count += 1
        return count

    @property
    def patience_is_over(self) -> bool:
        return self.patience is not None and self.without_improvement >= self.patience

    def loss_after(self, step: int) -> float | None:
        """The loss of the validation after that step, if it is the newest."""
        newest = self.validations[-1] if self.validations else None
        return newest.loss if newest is not None and newest.step == step else None

    def conclusion(self, *, best_file: str) -> str | None:
        """The result of validation for the user, in a sentence or two; None if nothing was measured.

        `best_file`: the file of the best validation; empty if it does not exist.
        """
        best = self.best
        if best is None:
            return None
        last, start = self.validations[-1], self.baseline
        if start is not None and best.loss >= start.loss:
            return (
                f"validation never fell below that of the base model ({start.loss:.4f} before training, at best "
                f"{best.loss:.4f}, at step {best.step}): the network does not generalise to the images held out. "
                "Lower the learning rate, or check the captions"
            )
        better = f" ({start.loss:.4f} before training)" if start is not None else ""
        if last.step == best.step:
            still = "it had stopped improving" if self.without_improvement else "training longer may still help"
            return f"validation was lowest at the end: {best.loss:.4f}{better}; {still}"
        worse = last.loss / best.loss - 1
        use = f"{best_file} is the one to use" if best_file else "there is no file of the best"
        how = f"made it {worse:.1%} worse" if worse >= 0.0005 else "did not improve it"
        return (
            f"validation was lowest at step {best.step} ({best.loss:.4f}){better}; the last {last.step - best.step} "
            f"steps {how}: {use}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the run's state."""
        return {"validations": [(one.step, one.loss, dict(one.by_timestep)) for one in self.validations]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.validations[:] = [Validation(*numbers) for numbers in state["validations"]]
