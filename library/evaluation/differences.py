"""Paired differences of losses to the base's, with their standard errors, and what follows from them in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SURE = 2.0  # standard errors from which a difference counts


@dataclass(frozen=True)
class Difference:
    """A mean loss beside the base's on the same images and noise. `percent`: of the base's loss, negative is better.
    `error`: its standard error; NaN for a single image."""

    loss: float
    base: float
    percent: float
    error: float

    @property
    def is_better(self) -> bool:
        """Whether it lies below zero by more than `SURE` standard errors."""
        return self.percent + SURE * self.error < 0

    @property
    def is_worse(self) -> bool:
        return self.percent - SURE * self.error > 0

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.2f}"
        return f"{self.percent:+.2f}{error}"


def difference(own: Sequence[float], base: Sequence[float]) -> Difference:
    """The difference of the means of two losses of the same images, and its standard error over the images.

    The estimator is the ratio of means r = mean(own) / mean(base), whose standard error is that of the residuals
    own - r · base, divided by mean(base) (Cochran 1977, Sampling Techniques, section 2.11). Pairing takes out that
    images differ in difficulty, which is far more than LoRAs differ.
    """
    count = len(base)
    mean, of_base = math.fsum(own) / count, math.fsum(base) / count
    ratio = mean / of_base
    residuals = math.fsum((a - ratio * b) ** 2 for a, b in zip(own, base, strict=True))
    error = math.sqrt(residuals / (count - 1) / count) / of_base if count > 1 else math.nan
    return Difference(mean, of_base, 100 * (ratio - 1), 100 * error)


def mean(differences: Sequence[Difference]) -> Difference:
    """The mean over folders, each of which counts alike; their errors are independent."""
    count = len(differences)
    return Difference(
        math.fsum(one.loss for one in differences) / count,
        math.fsum(one.base for one in differences) / count,
        math.fsum(one.percent for one in differences) / count,
        math.sqrt(math.fsum(one.error**2 for one in differences)) / count,
    )


@dataclass(frozen=True)
class Result:
    """A candidate's differences on one folder: over all noise levels, and at each. `trained`: the user says that these
    images were trained on."""

    candidate: str
    folder: str
    trained: bool
    images: int
    overall: Difference
    by_range: tuple[Difference, ...]


def worst(results: Iterable[Result]) -> Result:
    """The folder on which a candidate does worst beside the base."""
    return max(results, key=lambda one: one.overall.percent)


def hint(results: Sequence[Result]) -> str | None:
    """A sentence about a candidate that has learnt its images by heart: it improves images that it was trained on and
    makes others worse, both by more than two standard errors. None where that is not so."""
    better = [one for one in results if one.trained and one.overall.is_better]
    worse = [one for one in results if not one.trained and one.overall.is_worse]
    if not better or not worse:
        return None
    learnt, lost = better[0], worst(worse)
    return (
        f"{learnt.candidate}: overfitted: {learnt.overall.percent:+.1f} % on {learnt.folder}, which it was trained on, "
        f"and {lost.overall.percent:+.1f} % on {lost.folder}, which it was not. Fewer steps, a lower rank, a lower "
        "rate or a multiplier below 1 may help"
    )
