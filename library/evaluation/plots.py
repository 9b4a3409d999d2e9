"""The plots of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.evaluation.differences import SURE
from library.files.atomic import replacing

if TYPE_CHECKING:
    from library.evaluation.differences import Result


def plot_differences(path: Path, results: Sequence[Result], ranges: Sequence[str]) -> None:
    """A PNG with a panel for each folder: each candidate's difference to the base, over all noise levels and at each,
    with bars of two standard errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folders = list(dict.fromkeys(one.folder for one in results))
    candidates = list(dict.fromkeys(one.candidate for one in results))
    figure = Figure(figsize=(8, 2.6 * len(folders) + 0.4 + 0.22 * len(candidates)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(folders), 1, squeeze=False, sharex=True)[:, 0]
    drawn = []
    for axes, folder in zip(grid, folders, strict=True):
        own = [one for one in results if one.folder == folder]
        axes.axhline(0, color="0.6", linewidth=1)
        axes.axvline(0.5, color="0.85", linewidth=1)
        for number, one in enumerate(own):
            shift = 0.7 * ((number + 0.5) / len(own) - 0.5)
            values = (one.overall, *one.by_range)
            marks = axes.errorbar(
                [place + shift for place in range(len(values))],
                [value.percent for value in values],
                yerr=[SURE * value.error for value in values],
                fmt="o",
                color=f"C{number % 10}",
                capsize=3,
                markersize=4,
            )
            drawn.append(marks)
        trained = ", trained on" if own[0].trained else ""
        axes.set_title(f"{folder} ({own[0].images} images{trained})", fontsize=10, loc="left", parse_math=False)
        axes.set_xticks(range(1 + len(ranges)), ["all", *ranges])
        axes.set_ylabel("% of the base's loss")
        axes.grid(axis="y", color="0.92")
    grid[-1].set_xlabel("noise levels (timesteps); below zero is better than the base; bars: two standard errors")
    legend = figure.legend(
        drawn[: len(candidates)],
        candidates,
        loc="outside lower center",
        ncols=max(1, min(len(candidates), 90 // max(map(len, candidates)))),
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=100, format="png")
