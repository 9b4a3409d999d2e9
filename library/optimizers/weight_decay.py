"""Weight-decay curves: step → factor on the configured weight decay. `step` counts optimizer steps from 1.

All but `multi_stage` and `adaptive` hold 1 until step T = `transition_steps`. Those with `max_progress` P fall from T
to T (1 + P) and are constant from there on.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from library.errors import UserError

SCHEDULES = ("exponential", "cosine", "sigmoid", "linear", "multi_stage", "adaptive")
VANISHED = 1e-8  # a weight decay below this regularises nothing
STEEPNESS = 10.0  # of the logistic curve, which is cut off at 0.7 % of its way at both ends

Stages = tuple[tuple[int, float], ...]


def exponential(
    step: float, *, transition_steps: int, decay_factor: float, min_ratio: float, max_progress: float
) -> float:
    """1 up to `transition_steps` T, then max(min_ratio, decay_factor ** p) with p = min((step - T) / T, max_progress).

    With the usual numbers (1000, 0.7, 0.1, 2.0): step 1000 → 1, 1500 → 0.8367, 2000 → 0.7, 3000 and later → 0.49. The
    cap on p keeps the curve above `min_ratio` there; with max_progress = inf it keeps falling (5000 → 0.24, floor 0.1
    from step 7456).
    """
    if step <= transition_steps:
        return 1.0
    progress = min((step - transition_steps) / transition_steps, max_progress)
    return max(min_ratio, decay_factor**progress)


def cosine(step: float, *, transition_steps: int, min_ratio: float, max_progress: float) -> float:
    """Half a cosine from 1 to `min_ratio`."""
    way = _way(step, transition_steps, max_progress)
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * way)) / 2


def sigmoid(step: float, *, transition_steps: int, min_ratio: float, max_progress: float) -> float:
    """A logistic curve, stretched to be exactly 1 at T and `min_ratio` at the end; half of it lies at half the way."""
    way = _way(step, transition_steps, max_progress)
    start, now = _logistic(-STEEPNESS / 2), _logistic(STEEPNESS * (way - 0.5))
    return 1 - (1 - min_ratio) * (now - start) / (1 - 2 * start)


def linear(step: float, *, transition_steps: int, min_ratio: float, max_progress: float) -> float:
    """A straight line from 1 to `min_ratio`."""
    return 1 - (1 - min_ratio) * _way(step, transition_steps, max_progress)


def multi_stage(step: float, *, stages: Sequence[tuple[int, float]], interpolate: bool = False) -> float:
    """The ratio of the last of the (step, ratio) pairs whose step has been reached; 1 before the first.

    `interpolate` joins the points by straight lines instead, from ratio 1 at step 0 unless a pair says otherwise; the
    last ratio stays.
    """
    points = stages if stages and stages[0][0] <= 0 else [(0, 1.0), *stages]
    reached = bisect_right([start for start, _ in points], step) - 1
    start, ratio = points[reached]
    if not interpolate or reached == len(points) - 1:
        return ratio
    end, target = points[reached + 1]
    return ratio + (target - ratio) * (step - start) / (end - start)


def adaptive(
    step: float,
    *,
    flat_since: int | None,
    transition_steps: int,
    decay_factor: float,
    min_ratio: float,
    max_progress: float,
) -> float:
    """1 until the loss is flat, after step `flat_since` (None: not yet); from there on the exponential, which falls by
    `decay_factor` in every T steps."""
    if flat_since is None:
        return 1.0
    return exponential(
        step - flat_since + transition_steps,
        transition_steps=transition_steps,
        decay_factor=decay_factor,
        min_ratio=min_ratio,
        max_progress=max_progress,
    )


def _way(step: float, transition_steps: int, max_progress: float) -> float:
    """The position between T and the end, in [0, 1]."""
    return min(max(step - transition_steps, 0) / (transition_steps * max_progress), 1.0)


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# they reach `min_ratio` at T (1 + P), so P must be finite
WITH_AN_END = {"cosine": cosine, "sigmoid": sigmoid, "linear": linear}


class Curve(NamedTuple):  # not a dataclass: CustomAdamW makes one a step and group, and those take twice as long
    """One of the curves with its numbers. `stages` and `interpolate` are read by multi_stage only."""

    schedule: str = "exponential"
    transition_steps: int = 1000
    decay_factor: float = 0.7
    min_ratio: float = 0.1
    max_progress: float = 2.0
    stages: Stages = ()
    interpolate: bool = False

    def factor(self, step: float, *, flat_since: int | None = None) -> float:
        """The factor of the configured weight decay at `step`. `flat_since`: see `adaptive`."""
        if self.schedule == "multi_stage":
            return multi_stage(step, stages=self.stages, interpolate=self.interpolate)
        if self.schedule in WITH_AN_END:
            return WITH_AN_END[self.schedule](
                step,
                transition_steps=self.transition_steps,
                min_ratio=self.min_ratio,
                max_progress=self.max_progress,
            )
        assert self.schedule in ("exponential", "adaptive"), self.schedule
        return adaptive(
            step,
            flat_since=flat_since if self.schedule == "adaptive" else self.transition_steps,
            transition_steps=self.transition_steps,
            decay_factor=self.decay_factor,
            min_ratio=self.min_ratio,
            max_progress=self.max_progress,
        )

    def lowest(self, steps: int) -> float:
        """The smallest factor within so many steps; of the adaptive curve if the loss is flat from the beginning."""
        starts = (start for start, _ in self.stages if start <= steps)
        return min(self.factor(step, flat_since=0) for step in (steps, *starts))


def check(curve: Curve, *, owner: str) -> None:
    """Raise `UserError`, beginning with `owner`, for numbers that do not fit together. Ranges are checked before."""
    if curve.schedule in WITH_AN_END and not 0 < curve.max_progress < math.inf:
        raise UserError(
            f"{owner}: wd_max_progress = {curve.max_progress:g}; with wd_schedule '{curve.schedule}' it must be a "
            "number above 0: the curve ends this many times wd_transition_steps after the transition"
        )
    if curve.schedule != "multi_stage":
        if curve.stages:
            raise UserError(f"{owner}: wd_stages are for wd_schedule 'multi_stage', which is '{curve.schedule}'")
        return
    steps = [step for step, _ in curve.stages]
    if not steps:
        raise UserError(f"{owner}: wd_schedule 'multi_stage' needs wd_stages, such as 0:1.0,1000:0.7,3000:0.4")
    if steps != sorted(set(steps)) or steps[0] < 0:
        raise UserError(
            f"{owner}: wd_stages begin at steps {', '.join(map(str, steps))}; these must rise, from 0 or more"
        )
    if not all(0 <= ratio < math.inf for _, ratio in curve.stages):
        raise UserError(f"{owner}: wd_stages have a ratio below 0: {curve.stages}")
