"""The curve of a rate finder: two rules for a rate, the picture and the numbers."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.files.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.6  # decades of the rate that a point of the smoothed curve is the mean of
LEAST_FALL = 0.01  # of the loss before; a smaller fall is within the noise


@dataclass(frozen=True)
class Sweep:
    """`losses[i]` was measured after the step at `rates[i]`; `before`: before the first. `broken`: it ended early."""

    rates: list[float]
    losses: list[float]
    before: float
    broken: bool


@dataclass(frozen=True)
class Suggestion:
    """Rates by two rules. `lowest`: the smoothed loss at `lowest_at`; `turned`: whether it rose again after that."""

    steepest: float
    lowest_at: float
    lowest: float
    fall: float  # of the loss, relative to the one before
    turned: bool

    @property
    def tenth(self) -> float:
        return self.lowest_at / 10

    @property
    def rate(self) -> float:
        """The one that is recommended, in two digits."""
        return two_digits(self.steepest)


def two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")


def smoothed(rates: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Means over `SMOOTHING` decades around each point; less at the ends, but the same on both sides."""
    reach = _reach(rates)
    means = []
    for i in range(len(losses)):
        near = min(reach, i, len(losses) - 1 - i)
        part = losses[i - near : i + near + 1]
        means.append(sum(part) / len(part))
    return means


def slopes(rates: Sequence[float], losses: Sequence[float]) -> list[float]:
    """The change of the loss per decade of the rate: the slope of a straight line through the points near each."""
    reach = _reach(rates)
    x = [math.log10(rate) for rate in rates]
    found = []
    for i in range(len(x)):
        part = slice(max(0, i - reach), i + reach + 1)
        mean_x, mean_y = (sum(v[part]) / len(v[part]) for v in (x, losses))
        above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x[part], losses[part], strict=True))
        found.append(above / sum((a - mean_x) ** 2 for a in x[part]))
    return found


def _reach(rates: Sequence[float]) -> int:
    """The number of points on each side that the smoothing includes."""
    return max(1, round(SMOOTHING / 2 / math.log10(rates[1] / rates[0])))


def suggest(sweep: Sweep) -> Suggestion:
    """Both rules. Raises UserError for a curve from which no rate follows."""
    if len(sweep.rates) < 5:
        raise UserError(
            f"--find_lr: the loss diverged at rate {len(sweep.rates) + 1} of those tried: begin lower, with a smaller "
            "--find_lr_start"
        )
    smooth = smoothed(sweep.rates, sweep.losses)
    slope = slopes(sweep.rates, smooth)
    at = min(range(len(smooth)), key=smooth.__getitem__)
    if at == 0 or smooth[at] >= sweep.before:
        raise UserError(
            f"--find_lr: the loss does not fall below {sweep.before:.4g}, where it begins, at any rate from "
            f"{sweep.rates[0]:.1e} to {sweep.rates[-1]:.1e}: use other images, or a network that is not trained "
            "already"
        )
    steepest = min(range(at + 1), key=slope.__getitem__)
    return Suggestion(
        steepest=sweep.rates[steepest],
        lowest_at=sweep.rates[at],
        lowest=smooth[at],
        fall=(sweep.before - smooth[at]) / sweep.before,
        turned=sweep.broken or at < len(smooth) - 1 - _reach(sweep.rates),
    )


def write_numbers(path: Path, sweep: Sweep) -> None:
    """A CSV with a line for each rate."""
    smooth = smoothed(sweep.rates, sweep.losses)
    rows = zip(sweep.rates, sweep.losses, smooth, slopes(sweep.rates, smooth), strict=True)
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rate", "loss", "smoothed", "slope"])
        writer.writerows([f"{value:.6g}" for value in row] for row in rows)


def draw(path: Path, sweep: Sweep, suggestion: Suggestion, *, label: str) -> None:
    """A PNG of the loss and its slope against the rate. `label`: whose rate it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    smooth = smoothed(sweep.rates, sweep.losses)
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    upper.plot(sweep.rates, sweep.losses, ".", color="tab:blue", alpha=0.5, markersize=4, label="measured")
    upper.plot(sweep.rates, smooth, color="tab:blue", linewidth=1.8, label="smoothed")
    upper.axhline(sweep.before, color="0.8", linewidth=0.8, label="before the first step")
    depth = sweep.before - suggestion.lowest
    upper.set(title="learning rates tried, one step each", ylabel="loss")
    upper.set_ylim(suggestion.lowest - 0.3 * depth, sweep.before + 0.8 * depth)
    slope = slopes(sweep.rates, smooth)
    lower.plot(sweep.rates, slope, color="tab:blue", linewidth=1.8)
    lower.axhline(0, color="0.8", linewidth=0.8)
    steep = -min(slope)
    lower.set(xscale="log", xlabel=f"learning rate of {label}", ylabel="change of the loss\nper decade of the rate")
    lower.set_ylim(-1.3 * steep, 1.3 * steep)
    for axes in (upper, lower):
        _mark(axes, suggestion)
    upper.legend(frameon=False, loc="lower left")
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120, format="png")


def _mark(axes: Axes, suggestion: Suggestion) -> None:
    axes.axvline(suggestion.steepest, color="tab:green", linewidth=1.8, label=f"falls fastest: {suggestion.rate:.1e}")
    tenth = f"a tenth of the lowest's: {suggestion.tenth:.1e}"
    axes.axvline(suggestion.tenth, color="tab:orange", linewidth=1.2, linestyle="--", label=tenth)
    axes.axvline(suggestion.lowest_at, color="0.5", linewidth=1, linestyle=":", label="lowest")
