"""Held-out losses by rank, and the smallest rank that is good enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.files.atomic import replacing


@dataclass(frozen=True)
class Trained:
    """One finished run. `base`: the held-out loss before the first step; `loss`: the lowest after one, at `step`.
    `bytes`: of its file. `seconds`: of training; NaN if they are not known."""

    rank: int
    alpha: float
    seed: int
    base: float
    loss: float
    step: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Point:
    """A rank, over its seeds. `behind`: its loss minus that of the best rank, paired by seed; `error`: the standard
    error of that, 0 for the best and NaN for a single seed. `gain`: the fall of the loss in % of the base's."""

    rank: int
    runs: tuple[Trained, ...]
    loss: float
    behind: float
    error: float

    @property
    def base(self) -> float:
        """The loss of the base, the mean over the seeds."""
        return statistics.fmean(one.base for one in self.runs)

    @property
    def gain(self) -> float:
        return 100 * (1 - self.loss / self.base)


def points(runs: Sequence[Trained]) -> list[Point]:
    """The ranks in ascending order. Only the seeds that every rank has are compared."""
    by_rank: dict[int, dict[int, Trained]] = {}
    for one in sorted(runs, key=lambda run: (run.rank, run.seed)):
        by_rank.setdefault(one.rank, {})[one.seed] = one
    seeds = sorted(set.intersection(*(set(own) for own in by_rank.values())))
    losses = {rank: [own[seed].loss for seed in seeds] for rank, own in by_rank.items()}
    best = min(losses, key=lambda rank: (statistics.fmean(losses[rank]), rank))
    return [_point(rank, [own[seed] for seed in seeds], losses[best]) for rank, own in by_rank.items()]


def _point(rank: int, runs: Sequence[Trained], best: Sequence[float]) -> Point:
    behind = [one.loss - other for one, other in zip(runs, best, strict=True)]
    error = statistics.stdev(behind) / math.sqrt(len(behind)) if len(behind) > 1 else math.nan
    mean = statistics.fmean(one.loss for one in runs)
    return Point(rank, tuple(runs), mean, statistics.fmean(behind), error)


def knee(found: Sequence[Point], *, within: float) -> Point:
    """The smallest rank whose loss is as good as the lowest: behind it by no more than one standard error of the paired
    difference (the one-standard-error rule; Breiman et al. 1984, Classification and Regression Trees, section 3.4.3),
    or by no more than `within` % of what the best rank gains over the base, whichever is more."""
    best = min(found, key=lambda point: point.behind)
    gained = best.base - best.loss
    return next(
        point
        for point in found
        if point.behind <= max(0.0 if math.isnan(point.error) else point.error, within / 100 * max(gained, 0.0))
    )


def advice(found: Sequence[Point], chosen: Point) -> str:
    """A further sentence where the sweep does not answer the question; empty otherwise."""
    best = min(found, key=lambda point: point.behind)
    if best.gain <= 0:
        return (
            "no rank is better than the base on the held-out images: look at the rate, the number of steps and the "
            "captions first"
        )
    if len(found) > 1 and chosen is found[0]:
        return "the lowest rank that was tried is as good as any: a still lower one may be, too"
    if len(found) > 1 and chosen is found[-1]:
        return "the highest rank that was tried is the best: a still higher one may be better"
    return ""


def plot(path: Path, found: Sequence[Point], chosen: Point) -> None:
    """A PNG of the held-out loss by rank: every run, the means, and with several seeds one standard error of the
    difference to the best rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for point in found:
        axes.plot([point.rank] * len(point.runs), [one.loss for one in point.runs], ".", color="0.7")
    ranks, losses = [point.rank for point in found], [point.loss for point in found]
    errors = [0.0 if math.isnan(point.error) else point.error for point in found]
    axes.errorbar(ranks, losses, yerr=errors, fmt="o-", color="tab:blue", capsize=3, label="mean of the seeds")
    axes.plot(chosen.rank, chosen.loss, "o", markersize=13, fillstyle="none", color="tab:red", label="the knee")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    base = statistics.fmean(one.base for point in found for one in point.runs)
    axes.set(xlabel="rank", ylabel="lowest held-out loss", title=f"held-out loss by rank; the base's is {base:.5f}")
    axes.grid(color="0.92")
    axes.legend(frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=100, format="png")


ALPHAS: Mapping[str, str] = {
    "ratio": "alpha = rank × the alpha / rank of your own settings, so that every rank has the same scale; without a "
    "--network_alpha of yours alpha is the rank",
    "sqrt": "the same at your own rank, and alpha grows with the square root of the rank, as rsLoRA has it (arXiv "
    "2312.03732)",
    "fixed": "every rank has the alpha of your own settings, or the trainer's default",
}


def alpha_of(rule: str, rank: int, *, own_rank: int, own_alpha: float) -> float:
    """The alpha of a rank by one of `ALPHAS`, each of which keeps the user's own alpha at the user's own rank."""
    grows = {"ratio": rank / own_rank, "sqrt": math.sqrt(rank / own_rank), "fixed": 1.0}[rule]
    return float(f"{own_alpha * grows:.6g}")
