"""What a parameter group can switch on and set, checked once, and what follows from it for one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from library.errors import UserError, did_you_mean

from ..weight_decay import SCHEDULES, Curve
from ..weight_decay import check as check_curve
from .pairs import Role

TECHNIQUES = {  # option: name, in the order in which a step applies them
    "use_agr": "AGR",
    "use_orthogonal_grad": "OrthoGrad",
    "use_adopt_stability": "ADOPT",
    "use_tam": "TAM",
    "use_grams": "Grams",
    "use_cautious": "Cautious",
    "use_alora": "ALoRA",
    "dynamic_weight_decay": "dynamic weight decay",
    "use_spd": "SPD",
}


Schedule = Literal["exponential", "cosine", "sigmoid", "linear", "multi_stage", "adaptive"]


@dataclass(frozen=True)
class Recipe:
    """What a step does with one tensor: switches resolved against each other and against the tensor's role.

    It never changes from step to step, so that a compiled step is compiled once for each recipe.
    """

    beta1: float
    beta2: float
    eps: float
    agr: bool
    orthograd: bool
    adopt: bool
    adopt_eps: float
    adopt_clip: float
    tam: bool
    tam_beta: float
    tam_bias_correction: bool
    direction: Literal["", "grams", "cautious"]
    cautious_min: float
    alora: bool
    alora_ratio: float
    alora_eta: float
    lora_scale: float
    spd: bool
    spd_lambda: float
    spd_anchor: Literal["zero", "initial"]
    stochastic_rounding: bool


_SAME_NAME = (  # fields of `Recipe` that are options of a group
    *("eps", "adopt_eps", "adopt_clip", "tam_beta", "tam_bias_correction", "cautious_min", "alora_ratio", "alora_eta"),
    *("lora_scale", "spd_lambda", "spd_anchor", "stochastic_rounding"),
)
_SWITCHES = tuple(option for option in TECHNIQUES if option.startswith("use_"))


def options_key(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Everything in a group that `recipe_of` looks at."""
    return tuple(group[name] for name in ("betas", "orthograd_target", "lora_plus_ratio", *_SWITCHES, *_SAME_NAME))


class Rates(NamedTuple):
    """The numbers that change from step to step. Floats, or 0-d tensors for the compiled step."""

    step: Any  # of this tensor, from 1
    lr: Any
    decay: Any  # 1 - lr * weight decay
    step_size: Any  # lr / (1 - beta1 ** step), without ADOPT
    root_correction: Any  # sqrt(1 - beta2 ** step), without ADOPT


def recipe_of(group: Mapping[str, Any], *, role: Role, paired: bool, numel: int) -> Recipe:
    """The recipe for a tensor of `group` that is lora_down, lora_up or neither, with or without a partner."""
    given = {name: group[name] for name in _SAME_NAME}
    beta1, beta2 = group["betas"]
    target = group["orthograd_target"]
    direction: Literal["", "grams", "cautious"] = ""
    if group["use_grams"] or group["use_cautious"]:
        direction = "grams" if group["use_grams"] else "cautious"  # both: Grams leaves Cautious nothing to do
    # a group with LoRA+ has the ratio in its rate already: the row-wise part stays, the ratio must not come twice
    given["alora_ratio"] = group["alora_ratio"] if group["lora_plus_ratio"] is None else 1.0
    return Recipe(
        beta1=beta1,
        beta2=beta2,
        agr=group["use_agr"] and numel > 1,  # alone, a number is all of its gradient: AGR would never let it move
        orthograd=group["use_orthogonal_grad"] and (target == "all" or role == target),
        adopt=group["use_adopt_stability"],
        tam=group["use_tam"],
        direction=direction,
        alora=group["use_alora"] and paired and role == "up",
        spd=group["use_spd"] and group["spd_lambda"] > 0,
        **given,
    )


def curve_of(group: Mapping[str, Any]) -> Curve:
    """The curve of a group's weight decay."""
    return Curve(
        schedule=group["wd_schedule"],
        transition_steps=group["wd_transition_steps"],
        decay_factor=group["wd_decay_factor"],
        min_ratio=group["wd_min_ratio"],
        max_progress=group["wd_max_progress"],
        stages=group["wd_stages"],
        interpolate=group["wd_interpolate"],
    )


def decayed_weight_decay(group: Mapping[str, Any], step: int) -> float:
    """The group's weight decay at its `step`-th optimizer step."""
    if not group["dynamic_weight_decay"]:
        return float(group["weight_decay"])
    factor = curve_of(group).factor(max(step, 1), flat_since=group["wd_flat_since"])
    return float(group["weight_decay"] * factor)


def rates_of(group: Mapping[str, Any], step: int) -> Rates:
    """The numbers for tensors of `group` at their own `step`; the same arithmetic as torch's AdamW, in double."""
    lr = float(group["lr"])
    beta1, beta2 = group["betas"]
    return Rates(
        step=float(step),
        lr=lr,
        decay=1 - lr * decayed_weight_decay(group, group["step"]),
        step_size=lr / (1 - beta1**step),
        root_correction=(1 - beta2**step) ** 0.5,
    )


_RANGES: dict[str, tuple[float, float, str]] = {  # lowest, highest, in words
    "lr": (0, math.inf, "0 or more"),
    "eps": (0, math.inf, "0 or more"),
    "weight_decay": (0, math.inf, "0 or more"),
    "spd_lambda": (0, 1, "between 0 and 1"),
    "cautious_min": (1e-12, 1, "above 0, at most 1"),
    "adopt_eps": (1e-30, math.inf, "above 0"),
    "adopt_clip": (0, math.inf, "0 or more"),
    "tam_beta": (0, math.nextafter(1, 0), "from 0 to below 1"),
    "alora_ratio": (1e-30, math.inf, "above 0"),
    "alora_eta": (0, math.inf, "0 or more"),
    "lora_scale": (0, math.inf, "0 or more"),
    "wd_transition_steps": (1, math.inf, "1 or more"),
    "wd_decay_factor": (0, 1, "between 0 and 1"),
    "wd_min_ratio": (0, 1, "between 0 and 1"),
    "wd_max_progress": (0, math.inf, "0 or more (inf: no cap)"),
}
_CHOICES = {
    "spd_anchor": ("zero", "initial"),
    "orthograd_target": ("down", "up", "all"),
    "wd_schedule": SCHEDULES,
}


def check_group(group: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first value of a group that cannot be used."""
    for name, (low, high, words) in _RANGES.items():
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise UserError(f"CustomAdamW: {name} = {value!r}; it must be a number, {words}")
    betas = group["betas"]
    if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        raise UserError(f"CustomAdamW: betas = {betas!r}; they must be two numbers from 0 to below 1")
    for name in (*TECHNIQUES, "tam_bias_correction", "wd_interpolate", "stochastic_rounding"):
        if not isinstance(group[name], bool):
            raise UserError(f"CustomAdamW: {name} = {group[name]!r}; it must be True or False")
    for name, choices in _CHOICES.items():
        if group[name] not in choices:
            hint = did_you_mean(str(group[name]), choices)
            raise UserError(f"CustomAdamW: {name} = {group[name]!r}; it must be one of {', '.join(choices)}{hint}")
    _check_stages(group["wd_stages"])
    check_curve(curve_of(group), owner="CustomAdamW")


def _check_stages(stages: Any) -> None:
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
