"""`--dry_run=curves`: the curves that learning rate and weight decay will follow, as a picture, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from library import log
from library.files.atomic import replacing
from library.optimizers.groups import Group
from library.optimizers.schedules import create_schedule
from library.optimizers.weight_decay_choice import weight_decay_of
from library.run.curves import Curves, curves_of
from library.run.plan import Plan
from library.training.run import Run

SUFFIX = "-curves.png"
MOST_LINES = 8  # rates by block or layer make dozens
_POINTS = 2000  # of a line in the picture


@dataclass(frozen=True)
class Preview:
    """`rates`: by name of a group of parameters, that of each step, from step 1 on. `decays`: the weight decay of each
    step; None for an optimizer without one. `notes`: what a run may do otherwise."""

    rates: dict[str, list[float]]
    decays: list[float] | None
    notes: tuple[str, ...] = ()


def preview(curves: Curves, groups: Sequence[Group], *, steps: int) -> Preview:
    """The curves of a run of `steps` steps. `groups`: the optimizer's, with "name" and the rate as configured.

    The schedule runs on stand-ins. An adaptive weight decay falls as soon as it may, and one that follows the gradient
    norm falls at its usual speed: both depend on the training.
    """
    stand_ins = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": group.get("initial_lr", group["lr"])} for group in groups
    ]
    optimizer = torch.optim.SGD(stand_ins, lr=0.0)  # does nothing without gradients
    schedule = None if curves.schedule is None else create_schedule(curves.schedule, optimizer)
    base, decay = weight_decay_of(curves.optimizer), curves.decay
    rates: list[list[float]] = [[] for _ in groups]
    decays: list[float] = []
    if decay is not None and decay.curve.schedule == "adaptive":
        optimizer.param_groups[0]["wd_flat_since"] = decay.held
    for step in range(1, steps + 1):
        for line, group in zip(rates, optimizer.param_groups, strict=True):
            line.append(group["lr"])
        share = 1.0 if decay is None else decay.pace.factor(optimizer.param_groups[0], decay.curve, step)
        decays.append((base or 0.0) * share)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    named = dict(zip((str(group.get("name", n)) for n, group in enumerate(groups)), rates, strict=True))
    return Preview(named, None if base is None else decays, tuple(_notes(curves)))


def _notes(curves: Curves) -> list[str]:
    notes = []
    if curves.optimizer.finds_its_rate:
        notes.append(f"{curves.optimizer.name} finds its rate: these are factors on it")
    if curves.optimizer.relative_step:
        notes.append(f"{curves.optimizer.name} makes its rate itself")
    if curves.decay is not None and curves.decay.curve.schedule == "adaptive":
        notes.append("the weight decay falls when the loss is flat: here at the earliest")
    if curves.decay is not None and curves.decay.pace.by_gradient:
        notes.append("the weight decay falls up to twice as fast, or half as fast, as the gradients are")
    return notes


def write(plan: Plan, run: Run) -> Path:
    """Draw the curves of this run into the folder of its LoRA. An earlier picture is replaced."""
    steps = run.saves.total_steps
    with log.errors_only():  # the warnings have been logged
        curves = curves_of(plan, total_steps=steps)
    found = preview(curves, run.optimizer.optimizer.param_groups, steps=steps)
    last = run.saves.last_file
    path = last.with_name(f"{last.stem}{SUFFIX}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, found, title=last.stem)
    return path


def draw(path: Path, found: Preview, *, title: str) -> None:
    """A PNG with the rates above the weight decay. Groups with equal curves share a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True)
    for names, line in _lines(found.rates):
        upper.plot(*_points(line), linewidth=1.8, label=names)
    if found.decays is None:
        lower.text(0.5, 0.5, "this optimizer has no weight decay", ha="center", transform=lower.transAxes)
    else:
        lower.plot(*_points(found.decays), color="tab:green", linewidth=1.8)
    upper.set_title("\n".join((f"{title}: as planned", *found.notes)), parse_math=False)
    upper.set(ylabel="learning rate")
    lower.set(xlabel="optimizer step", ylabel="weight decay")
    for axes in (upper, lower):
        axes.set_ylim(bottom=0)
        axes.grid(color="0.92")
    upper.legend(frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120, format="png")


def _lines(rates: dict[str, list[float]]) -> list[tuple[str, list[float]]]:
    """(names, curve), the first ones; groups with the same curve together."""
    together: dict[tuple[float, ...], list[str]] = {}
    for name, line in rates.items():
        together.setdefault(tuple(line), []).append(name)
    found = [(", ".join(names[:3]) + (", …" if len(names) > 3 else ""), [*line]) for line, names in together.items()]
    return found[:MOST_LINES]


def _points(line: Sequence[float]) -> tuple[list[int], list[float]]:
    """Steps and values, not more than the picture can show."""
    steps = range(1, len(line) + 1, max(1, len(line) // _POINTS))
    return [*steps], [line[step - 1] for step in steps]
