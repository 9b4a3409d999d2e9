"""Dynamic weight decay: constant for some steps, then falling along a curve of library/optimizers/weight_decay.py.

No paper: this optimizer's own. The flags are those of every optimizer (library/config/options/weight_decay.py).
The curve "adaptive" falls once the loss has become flat (library/optimizers/plateau.py), so it needs the losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from library.errors import UserError

from ...groups import Group, Options
from ...plateau import Plateau
from ...weight_decay import Curve
from ...weight_decay import check as check_curve
from ..setting import setting
from ..technique import Technique


@dataclass(frozen=True)
class DynamicWeightDecay(Technique):
    """Keeps the weight decay for `--wd_transition_steps`, then lets it fall along `--wd_schedule`."""

    dynamic_weight_decay: bool = setting(True, help="let the weight decay change with the steps")
    wd_transition_steps: int = setting(1000, minimum=1, help="steps before it falls")
    wd_decay_factor: float = setting(0.7, minimum=0, maximum=1, help="exponential: the factor over as many steps again")
    wd_min_ratio: float = setting(0.1, minimum=0, maximum=1, help="it never falls below this share of itself")
    wd_max_progress: float = setting(
        2.0, minimum=0, help="it stops falling after this many times the transition (inf: no cap)"
    )
    wd_schedule: Literal["exponential", "cosine", "sigmoid", "linear", "multi_stage", "adaptive"] = setting(
        "exponential", help="its curve"
    )
    wd_stages: tuple[tuple[int, float], ...] = setting((), help="multi_stage: pairs of a step and a ratio")
    wd_interpolate: bool = setting(False, help="multi_stage: go from ratio to ratio in straight lines")
    wd_flat_since: int | None = setting(None, help="adaptive: the step since which the loss is flat", of_group=True)

    name = "dynamic weight decay"

    @property
    def curve(self) -> Curve:
        return Curve(
            schedule=self.wd_schedule,
            transition_steps=self.wd_transition_steps,
            decay_factor=self.wd_decay_factor,
            min_ratio=self.wd_min_ratio,
            max_progress=self.wd_max_progress,
            stages=self.wd_stages,
            interpolate=self.wd_interpolate,
        )

    def decay_factor(self, step: int) -> float:
        return self.curve.factor(step, flat_since=self.wd_flat_since)

    def check(self) -> None:
        _check_stages(self.wd_stages)
        check_curve(self.curve, owner="CustomAdamW")


def waiting(groups: Sequence[Group]) -> list[Group]:
    """The groups whose weight decay waits for the loss to become flat."""
    return [group for group in groups if group["dynamic_weight_decay"] and group["wd_schedule"] == "adaptive"]


def plateau(wd_flat: Mapping[str, float] | None) -> Plateau:
    """The criterion of a flat loss. Raises `UserError`."""
    flat: Options = wd_flat or {}
    try:
        return Plateau(**flat)
    except TypeError as error:
        raise UserError(f"CustomAdamW: wd_flat = {wd_flat!r}: {error}") from error


def _check_stages(stages: object) -> None:
    pairs = stages if isinstance(stages, list | tuple) else [None]
    for pair in pairs:
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and isinstance(pair[0], int)
            and isinstance(pair[1], int | float)
        ):
            raise UserError(
                f"CustomAdamW: wd_stages = {stages!r}; they must be pairs of a step and a ratio, such as "
                "((0, 1.0), (1000, 0.7))"
            )
