"""The settings of a parameter group, checked once, and what follows from them for one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from library.errors import UserError

from ..groups import Options
from . import techniques
from .setting import Setting
from .technique import About, Technique

if TYPE_CHECKING:
    from torch import Tensor


MOMENTS = ("exp_avg", "exp_avg_sq")  # m, signed, and v, which is not


@dataclass(frozen=True)
class Recipe:
    """The form of a step of one tensor: the techniques that act on it, with their settings.

    It never changes from step to step, so that a compiled step is compiled once for each recipe.
    """

    beta1: float
    beta2: float
    eps: float
    stochastic_rounding: bool
    techniques: tuple[Technique, ...]

    @property
    def normalized(self) -> bool:
        """Whether the update needs no division by the second moment."""
        return any(technique.normalizes for technique in self.techniques)

    @property
    def moments(self) -> tuple[str, ...]:
        """The moments that are kept: m, and v if a technique or Adam's division needs it."""
        return MOMENTS[:1] if any(technique.one_moment for technique in self.techniques) else MOMENTS

    @property
    def reads_matrix(self) -> bool:
        """Whether a step needs the rows and columns of its tensor."""
        return any(technique.reads_matrix for technique in self.techniques)

    @property
    def reads_down(self) -> bool:
        """Whether a step of a lora_up needs its lora_down from before the step."""
        return any(technique.reads_down for technique in self.techniques)


Number: TypeAlias = "float | Tensor"


class Rates(NamedTuple):
    """The numbers that change from step to step. Floats, or 0-d tensors for the compiled step."""

    step: Number  # of this tensor, from 1
    lr: Number
    decay: Number  # 1 - lr * weight decay
    step_size: Number  # lr / (1 - beta1 ** step), if the update is not already normalised
    root_correction: Number  # sqrt(1 - beta2 ** step), likewise


class Recipes:
    """The recipes of one group's tensors: equal ones are one object."""

    def __init__(self, group: Options) -> None:
        self._group = group
        self._acting = techniques.acting(group)
        self._known: dict[tuple[Technique, ...], Recipe] = {}

    def of(self, about: About) -> Recipe:
        """The recipe of a tensor of this kind."""
        applied = tuple(technique for technique in self._acting if technique.applies(about))
        if applied not in self._known:
            beta1, beta2 = self._group["betas"]
            rounding = self._group["stochastic_rounding"]
            self._known[applied] = Recipe(beta1, beta2, self._group["eps"], rounding, applied)
        return self._known[applied]


def options_key(group: Options) -> tuple[object, ...]:
    """Everything in a group that `Recipes` depends on."""
    return (
        group["betas"],
        group["eps"],
        group["stochastic_rounding"],
        *(group[name] for name in techniques.for_tensors()),
    )


def decayed_weight_decay(group: Options, step: int) -> float:
    """The group's weight decay at its `step`-th optimizer step. "wd_factor": set if `weight_decay_pace` decides."""
    factor = group["wd_factor"] if "wd_factor" in group else techniques.decay_factor(group, step)
    return float(group["weight_decay"] * factor)


def rates_of(group: Options, step: int, weight_decay: float) -> Rates:
    """The numbers for tensors of `group` at their own `step`; the same arithmetic as torch's AdamW, in double."""
    lr = float(group["lr"])
    beta1, beta2 = group["betas"]
    return Rates(
        step=float(step),
        lr=lr,
        decay=1 - lr * weight_decay,
        step_size=lr / (1 - beta1**step),
        root_correction=(1 - beta2**step) ** 0.5,
    )


def check_group(group: Options) -> None:
    """Raise `UserError` for the first value of a group that cannot be used."""
    for name in ("lr", "eps", "weight_decay"):
        Setting(name, float, None, minimum=0).check(group[name])
    betas = group["betas"]
    if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        raise UserError(f"CustomAdamW: betas = {betas!r}; they must be two numbers from 0 to below 1")
    Setting("stochastic_rounding", bool, None).check(group["stochastic_rounding"])
    techniques.check(group)
