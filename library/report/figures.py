"""One chart, drawn by Bokeh in colours that are legible on white and on black: the page follows the reader's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import (
    BoxZoomTool,
    FixedTicker,
    HoverTool,
    PanTool,
    PrintfTickFormatter,
    Range1d,
    ResetTool,
    SaveTool,
    Span,
    WheelZoomTool,
)
from bokeh.plotting import figure

from library.report.read import Curve

RANGE = "steps"  # the name of the range that all charts share
COLOURS = ("#2f7ed8", "#e8853a", "#1fa774", "#d6457a", "#8a63d2", "#17a2b8", "#b8860b", "#7f8c8d", "#c0392b", "#5d8a2a")
TEXT, GRID = "#7d8590", "#7d859040"


@dataclass(frozen=True)
class Line:
    """One curve of a chart. `faint`: behind the others; `dots`: with its points, of which there are few."""

    label: str
    curve: Curve
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Marks:
    """Dashed lines across a chart: at these steps, and at these values."""

    steps: tuple[float, ...] = ()
    values: tuple[float, ...] = ()


NO_MARKS = Marks()


@dataclass(frozen=True)
class Key:
    """The name of a curve, and the names of its Bokeh parts, by which the page shows and hides it."""

    label: str
    colour: str
    parts: list[str]


def steps_of(last: int) -> Range1d:
    """The range of steps, up to the last."""
    return Range1d(0, last, bounds=(0, last), name=RANGE)


def draw(
    number: int, steps: Range1d, lines: Sequence[Line], *, log: bool, small: bool, marks: Marks = NO_MARKS
) -> tuple[Any, list[Key]]:
    """A Bokeh figure, and the key to its curves. `number`: which chart of the page it is. `log`: a logarithmic axis;
    values not above 0 are left out. `small`: show the numbers with an exponent."""
    plot = figure(
        height=300,
        sizing_mode="stretch_width",
        x_range=steps,
        y_axis_type="log" if log else "linear",
        tools=[],
        x_axis_label="step",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        min_border_right=12,
    )
    zoom = BoxZoomTool(dimensions="width")
    plot.add_tools(zoom, PanTool(), WheelZoomTool(dimensions="width"), ResetTool(), SaveTool())
    plot.toolbar.active_drag = zoom
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    values = {value for line in lines for value in line.curve.values}
    if len(values) == 1 and not log:  # a constant: Bokeh's axis would span 2 around it, whatever its size
        plot.y_range.default_span = abs(next(iter(values))) or 1.0
    if small:
        plot.y_range.start = 0
    if log:
        plot.yaxis.ticker = FixedTicker(ticks=log_ticks([value for value in values if value > 0]))
    if small or log:
        plot.yaxis.formatter = PrintfTickFormatter(format="%.2g")
    colours = iter(COLOURS * (len(lines) // len(COLOURS) + 1))
    keys = [
        Key(line.label, TEXT if line.faint else next(colours), [f"{number}-{i}", f"{number}-{i}-dots"][: 1 + line.dots])
        for i, line in enumerate(lines)
    ]
    for line, key in zip(lines, keys, strict=True):
        _line(plot, line, key, log=log)
    for dimension, places in (("height", marks.steps), ("width", marks.values)):
        for place in places:
            plot.add_layout(Span(location=place, dimension=dimension, line_color=TEXT, line_dash="dashed"))
    _style(plot)
    return plot, keys


def log_ticks(values: Sequence[float]) -> list[float]:
    """The labels of a logarithmic axis: Bokeh's own rule leaves most of an axis below two decades without any."""
    if not values:
        return []
    low, high = math.log10(min(values)), math.log10(max(values))
    mantissas = (1.0,) if high - low > 4 else (1.0, 2.0, 5.0) if high - low > 1 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    return [float(f"{mantissa}e{exponent}") for exponent in exponents for mantissa in mantissas]


def _line(plot: Any, line: Line, key: Key, *, log: bool) -> None:
    values = np.array(line.curve.values)
    if log:
        values[values <= 0] = np.nan
    data = {"step": np.array(line.curve.steps), "value": values}
    width, alpha = (1, 0.45) if line.faint else (2, 1.0)
    drawn = plot.line("step", "value", source=data, color=key.colour, width=width, alpha=alpha, name=key.parts[0])
    if line.dots:
        plot.scatter("step", "value", source=data, color=key.colour, size=6, name=key.parts[1])
    if not line.faint:
        tips = [("step", "@step{0}"), (line.label, "@value{%.4g}")]
        hover = HoverTool(
            renderers=[drawn], tooltips=tips, formatters={"@value": "printf"}, mode="vline", visible=False
        )
        plot.add_tools(hover)


def _style(plot: Any) -> None:
    for axis in plot.axis:
        axis.axis_label_text_color = axis.major_label_text_color = TEXT
        axis.axis_line_color = axis.major_tick_line_color = GRID
        axis.minor_tick_line_color = None
        axis.axis_label_text_font_style = "normal"
    plot.grid.grid_line_color = GRID
