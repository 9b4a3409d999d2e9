"""Decides whether the training loss has become flat, for the weight decay that waits for it.

The original rule: over the last 100 steps, and never before step 500, |last loss - first loss| / 100 < 0.001. Two
single losses of a diffusion model are too noisy: with a standard deviation of 0.1 their difference alone has an error
of 0.0014 a step. Here the line of least squares through all losses of the window replaces them (error 0.00035), and its
slope must be below the threshold by more than its own standard error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from library.errors import UserError
from library.optimizers.groups import Group

logger = logging.getLogger(__name__)


class Seen(TypedDict):
    """The numbers of the last steps, the oldest first: plain tuples, for state dicts. See `Plateau.observe`."""

    flat: bool
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    validation_losses: tuple[float, ...]


NOTHING: Seen = {"flat": False, "losses": (), "gradient_norms": (), "validation_losses": ()}


class Trend(NamedTuple):
    """The line of least squares through values one step apart."""

    slope: float  # per step
    error: float  # standard error of the slope
    variance: float  # of the values around the line


def trend(values: Sequence[float]) -> Trend:
    """The trend of three values or more."""
    n = len(values)
    middle, mean = (n - 1) / 2, math.fsum(values) / n
    spread = n * (n * n - 1) / 12  # sum of (i - middle)^2
    slope = math.fsum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread
    left = math.fsum((value - mean - slope * (i - middle)) ** 2 for i, value in enumerate(values))
    variance = left / (n - 2)
    return Trend(slope, math.sqrt(variance / spread), variance)


class Plateau:
    """Decides when the loss is flat. It has no state: that is in the optimizer's groups, and so in its state dict."""

    def __init__(
        self,
        *,
        window: int = 100,
        slope: float = 1e-3,
        earliest: int = 500,
        variance: float | None = None,
        gradient: float | None = None,
        validation: float | None = None,
    ) -> None:
        """The loss is flat if over the last `window` steps, and never before step `earliest`, |its slope per step| plus
        the slope's standard error is below `slope`. Further conditions, each only if given:

        variance: the loss's variance around its trend is below this.
        gradient: the gradient norm is flat by the same rule with this slope.
        validation: the last validation loss is not lower than the best before it by this much or more.
        """
        if window < 3:
            raise UserError(f"wd_flat: window={window}; a trend needs 3 steps or more")
        for name, value in {"slope": slope, "variance": variance, "gradient": gradient}.items():
            if value is not None and not value > 0:
                raise UserError(f"wd_flat: {name}={value:g}; it must be above 0")
        self.window, self.slope, self.earliest = window, slope, earliest
        self.variance, self.gradient, self.validation = variance, gradient, validation

    def tell(
        self,
        groups: Sequence[Group],
        *,
        counter: str,
        loss: float,
        gradient_norm: float | None = None,
        validation_loss: float | None = None,
    ) -> None:
        """Observe for parameter groups that wait for the loss to be flat: from then on "wd_flat_since" is the number of
        steps that group["<counter>"] had counted. The observations are stored in the first group, as "wd_seen"."""
        seen = self.observe(
            groups[0].get("wd_seen", NOTHING),
            step=groups[0].get(counter, 0),
            loss=loss,
            gradient_norm=gradient_norm,
            validation_loss=validation_loss,
        )
        groups[0]["wd_seen"] = seen
        waiting = [group for group in groups if group.get("wd_flat_since") is None]
        if seen["flat"] and waiting:
            logger.info("the loss is flat after %d steps: from here the weight decay falls", waiting[0].get(counter, 0))
            for group in waiting:
                group["wd_flat_since"] = group.get(counter, 0)

    def observe(
        self,
        seen: Seen,
        *,
        step: int,
        loss: float,
        gradient_norm: float | None = None,
        validation_loss: float | None = None,
    ) -> Seen:
        """The observations (at first `NOTHING`) with the numbers of one more step; "flat" is the verdict.

        `step`: optimizer steps done before it. Values that are not finite are ignored.
        """
        if seen["flat"]:
            return seen
        losses = self._added(seen["losses"], loss)
        norms = self._added(seen["gradient_norms"], gradient_norm)
        validation = self._added(seen["validation_losses"], validation_loss)
        if step >= self.earliest and self._flat(losses, norms, validation):
            return {**NOTHING, "flat": True}  # the observations are no longer needed
        return {"flat": False, "losses": losses, "gradient_norms": norms, "validation_losses": validation}

    def _added(self, values: tuple[float, ...], value: float | None) -> tuple[float, ...]:
        """A new tuple, so that state dicts with the old one do not change."""
        return values if value is None or not math.isfinite(value) else (*values, value)[-self.window :]

    def _flat(self, losses: Sequence[float], norms: Sequence[float], validation: Sequence[float]) -> bool:
        if len(losses) < self.window or not _is_flat(of_loss := trend(losses), self.slope):
            return False
        if self.variance is not None and of_loss.variance >= self.variance:
            return False
        if self.gradient is not None and (len(norms) < self.window or not _is_flat(trend(norms), self.gradient)):
            return False
        if self.validation is not None:
            return len(validation) >= 2 and min(validation[:-1]) - validation[-1] < self.validation
        return True


def _is_flat(line: Trend, threshold: float) -> bool:
    return abs(line.slope) + line.error < threshold
