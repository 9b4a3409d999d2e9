"""The charts of a run and the note below each. They zoom together, and need no internet connection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bokeh.embed import components
from bokeh.resources import Resources

from library.record.forgetting import SEVERE, WARNED
from library.report import figures
from library.report.figures import NO_MARKS, Key, Line, Marks
from library.report.loss_plot import smoothed
from library.report.read import Curve, Story

LIMITS = (100 * WARNED, 100 * SEVERE)
MOST_GROUPS = 8  # of parameters in one chart; rates by block or layer make dozens


@dataclass(frozen=True)
class Chart:
    """`lines` to draw; `log`, `small` and `marks` as in `figures.draw`."""

    title: str
    note: str
    lines: list[Line]
    log: bool = False
    small: bool = False
    marks: Marks = NO_MARKS


@dataclass(frozen=True)
class Drawn:
    """`html` is the place that the script fills."""

    title: str
    note: str
    html: str
    keys: list[Key]


def draw(story: Story) -> tuple[list[Drawn], str]:
    """The charts for which there are numbers, and the script that draws them."""
    steps = figures.steps_of(max(story.last_step, 1))
    wanted = [chart for chart in charts(story) if any(line.curve.steps for line in chart.lines)]
    if not wanted:
        return [], ""
    made = [
        figures.draw(n, steps, chart.lines, log=chart.log, small=chart.small, marks=chart.marks)
        for n, chart in enumerate(wanted)
    ]
    script, places = components(tuple(plot for plot, _ in made))
    drawn = [
        Drawn(chart.title, chart.note, html, keys if len(keys) > 1 else [])
        for chart, html, (_, keys) in zip(wanted, places, made, strict=True)
    ]
    return drawn, script


def library() -> str:
    """Bokeh's own code, as HTML."""
    return str(Resources(mode="inline", components=["bokeh"]).render())


def charts(story: Story) -> Iterator[Chart]:
    """In the order of the page."""
    curves = story.curves
    empty = Curve()
    loss = [Line("each step", curves.get("loss", empty), faint=True)]
    loss.append(Line("mean of 100 steps", curves.get("loss_average", empty)))
    if "validation/loss" in curves:
        loss.append(Line("validation", curves["validation/loss"], dots=True))
    if "gap/trained" in curves:
        loss.append(Line("trained images, at validation's noise", curves["gap/trained"], dots=True))
    note = "A single step's loss depends on the noise levels drawn for it; learning shows in the mean."
    best = story.best
    if best is not None:
        note += f" Dashed: the best validation, {best[1]:.4f} after step {best[0]:.0f}."
    yield Chart("Loss", note, loss, marks=NO_MARKS if best is None else Marks(steps=(best[0],)))
    note = "Moving means. Low timesteps (little noise) decide about fine detail, high ones about the composition."
    yield Chart("Loss by timestep", note, [Line(line.label, _mean(line.curve)) for line in _group(story, "timesteps")])
    note = "In effect, for each group of parameters."
    yield _of_groups("Learning rate", note, _group(story, "rates"))
    decays = _group(story, "weight_decay")
    if any(any(line.curve.values) for line in decays):
        yield _of_groups("Weight decay", "In effect, after its curve.", decays)
    norm = curves.get("gradient_norm", empty)
    lines = [Line("each step", norm, faint=True), Line("moving mean", _mean(norm))]
    yield Chart("Gradient norm", "Of all gradients together, before clipping.", lines, log=True)
    update = [Line("share", curves.get("update_ratio", empty))]
    yield Chart("Size of the update", "The change of the weights in a step, relative to them.", update, log=True)
    deltas = sorted(_group(story, "deltas"), key=lambda line: line.label not in ("mean", "largest"))
    note = "How far the LoRA moves the model's layers from where they were: the mean of all, the largest, and by block."
    yield Chart("Norm of the adapters' deltas", note, deltas)
    validation = [line for line in _group(story, "validation", dots=True) if line.label != "loss"]
    yield Chart("Validation loss by timestep", "On images that are not trained.", validation)
    sets = [Line("validation", curves.get("validation/loss", empty), dots=True)]
    sets += _group(story, "validation_sets", dots=True)
    yield Chart("Validation loss by set", "Folders of --validation_dir.", sets if len(sets) > 1 else [])
    note = "How far the loss of held-out images is above that of trained ones with equal noise, in %."
    yield Chart("Gap between validation and training", note, [Line("gap", curves.get("gap/gap", empty), dots=True)])
    note = "How far the loss on unrelated images is above the base model's, in %. Dashed: the limits of the warnings."
    yield Chart("Forgetting", note, _group(story, "forgetting", dots=True), marks=Marks(values=LIMITS))


def _group(story: Story, prefix: str, *, dots: bool = False) -> list[Line]:
    """The curves whose names begin with it, as they first came."""
    named = ((name.partition("/")[2], curve) for name, curve in story.curves.items() if name.startswith(f"{prefix}/"))
    return [Line(name, curve, dots=dots) for name, curve in named]


def _of_groups(title: str, note: str, lines: list[Line]) -> Chart:
    """One line for each group; of many groups the lowest, the highest, and some between."""
    if len(lines) > MOST_GROUPS:
        note = f"{note} {MOST_GROUPS} of the {len(lines)} groups, from the highest to the lowest."
        ranked = sorted(lines, key=lambda line: -max(line.curve.values, default=0.0))
        lines = [ranked[round(i * (len(ranked) - 1) / (MOST_GROUPS - 1))] for i in range(MOST_GROUPS)]
    return Chart(title, note, lines, small=True)


def _mean(curve: Curve) -> Curve:
    """Its moving mean."""
    made = Curve()
    made.steps = curve.steps
    made.values = smoothed(curve.values, window=max(10, len(curve.values) // 20))
    return made
