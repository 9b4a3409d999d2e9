"""A picture of the loss curve."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from library.files.atomic import replacing
from library.record.loss_history import LossHistory
from library.record.validation_history import History


def smoothed(losses: Sequence[float], *, window: int) -> list[float]:
    """Mean over the last `window` values, fewer at the start: one value per loss."""
    means: list[float] = []
    within: deque[float] = deque(maxlen=window)
    for loss in losses:
        within.append(loss)
        finite = [value for value in within if math.isfinite(value)]  # NaN: a step that was skipped
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def plot(
    path: Path, history: LossHistory, *, steps_per_epoch: int, title: str, validation: History | None = None
) -> None:
    """A PNG of the loss per optimizer step (in a long run, per few steps) as a faint line, and of its moving mean as a
    strong one; and of the validation loss, with a dashed line at its best step.

    The noise level drawn for each image changes a single step's loss more than learning does, so the mean is the
    curve to look at.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = zip(*history.curve(), strict=True) if history.points else ((), ())
    stretch, last = history.stretch, history.stretch * len(losses)
    window = max(10, len(losses) // 20)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    each = "per step" if stretch == 1 else f"mean of {stretch} steps"
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label=each)
    label = f"mean of {window * stretch} steps"
    axes.plot(steps, smoothed(losses, window=window), color="tab:blue", linewidth=1.8, label=label)
    if validation is not None and validation.validations:
        measured = [(one.step, one.loss) for one in validation.validations]
        axes.plot(*zip(*measured, strict=True), color="tab:orange", linewidth=1.5, marker=".", label="validation")
        if (best := validation.best) is not None:
            label = f"best validation: {best.loss:.4f}, step {best.step}"
            axes.axvline(best.step, color="tab:orange", linewidth=1.0, linestyle="--", label=label)
    for boundary in range(steps_per_epoch, last, max(steps_per_epoch, last // 20)):
        axes.axvline(boundary, color="0.85", linewidth=0.6, zorder=0)
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="optimizer step", ylabel="loss", xlim=(0 if validation else 1, max(2, last)))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120, format="png")
