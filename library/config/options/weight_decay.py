"""The options of a weight decay that changes with the steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from library.config.fields import BadValue, option, read_float, read_int

# Which curves read which of these options
READ_BY = {
    "wd_transition_steps": ("exponential", "cosine", "sigmoid", "linear", "adaptive"),
    "wd_decay_factor": ("exponential", "adaptive"),
    "wd_min_ratio": ("exponential", "cosine", "sigmoid", "linear", "adaptive"),
    "wd_max_progress": ("exponential", "cosine", "sigmoid", "linear", "adaptive"),
    "wd_stages": ("multi_stage",),
    "wd_interpolate": ("multi_stage",),
    "wd_flat": ("adaptive",),
    "wd_speed": ("exponential", "cosine", "sigmoid", "linear", "adaptive"),
    "wd_lr_coupling": ("exponential", "cosine", "sigmoid", "linear", "multi_stage", "adaptive"),
}
_SHARE = re.compile(r"\d+(\.\d*)?%|\.\d+%")


def read_transition(word: str) -> int | str:
    """Steps (1000), a percentage of the run ("20%") or "auto"."""
    if word == "auto":
        return word
    if _SHARE.fullmatch(word):
        if float(word[:-1]) > 100:
            raise BadValue(f"'{word}' is more than all steps")
        return word
    try:
        steps = read_int(word)
    except BadValue:
        steps = 0
    if steps < 1:
        raise BadValue(f"'{word}' is neither a number of steps, nor a percentage such as 20%, nor auto")
    return steps


def read_share(word: str) -> float | str:
    """A number from 0 to 1, or "auto"."""
    if word == "auto":
        return word
    try:
        number = read_float(word)
    except BadValue:
        number = math.nan
    if not 0 <= number <= 1:
        raise BadValue(f"'{word}' is neither a number from 0 to 1 nor auto")
    return number


def read_least(word: str) -> float | str:
    """A number from 0 to 1, "auto", or "complexity"."""
    try:
        return word if word == "complexity" else read_share(word)
    except BadValue:
        raise BadValue(f"'{word}' is neither a number from 0 to 1 nor auto nor complexity") from None


def read_progress(word: str) -> float:
    """A number of 0 or more; inf is one."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not number >= 0:
        raise BadValue(f"'{word}' is not a number of 0 or more, or inf")
    return number


def read_stages(word: str) -> tuple[str, ...]:
    """ "0:1.0,1000:0.7,20%:0.4": where a stage begins, as a step or a percentage of the run, and its ratio."""
    stages = tuple(stage.strip() for stage in word.split(",") if stage.strip())
    for stage in stages:
        start, colon, ratio = stage.partition(":")
        if not colon or not (start.isdecimal() or _SHARE.fullmatch(start)) or not _is_ratio(ratio):
            raise BadValue(f"'{stage}' is not a stage such as 1000:0.7 or 20%:0.7 (step:ratio)")
    return stages


def _is_ratio(word: str) -> bool:
    try:
        return read_float(word) >= 0
    except BadValue:
        return False


@dataclass(frozen=True, kw_only=True)
class WeightDecayOptions:
    """Weight decay that changes with the steps, for CustomAdamW and every optimizer with a weight_decay (ours)"""

    dynamic_weight_decay: bool | None = option(
        None,
        help="let the weight decay change with the steps of the optimizer (default: on with CustomAdamW, else off)",
    )
    wd_schedule: Literal["exponential", "cosine", "sigmoid", "linear", "multi_stage", "adaptive"] | None = option(
        None, help="its curve (default: exponential); adaptive: exponential, from when the loss has become flat"
    )
    wd_transition_steps: int | str | None = option(
        None, read=read_transition, help="steps before it falls: 1000 (the default), 20%, or auto"
    )
    wd_decay_factor: float | str | None = option(
        None, read=read_share, help="exponential: the factor over as many steps again (default: 0.7), or auto"
    )
    wd_min_ratio: float | str | None = option(
        None,
        read=read_least,
        help="it never falls below this share of itself (default: 0.1), or auto: by the number of images, or "
        "complexity: by that and the trained numbers over those of the images' latents",
    )
    wd_max_progress: float | None = option(
        None,
        read=read_progress,
        help="it stops falling after this many times the transition (default: 2: exponential ends at factor squared "
        "= 0.49 and never reaches --wd_min_ratio; inf: exponential keeps falling, the others last to the run's end)",
    )
    wd_stages: tuple[str, ...] | None = option(
        None,
        read=read_stages,
        joined_by=",",
        help="multi_stage: its ratios from these steps on: 0:1.0,1000:0.7,3000:0.4, or 0:1.0,20%:0.7,60%:0.4",
    )
    wd_interpolate: bool = option(False, help="multi_stage: go from ratio to ratio in straight lines, not in steps")
    wd_flat: tuple[str, ...] = option(
        (), help="adaptive: when the loss counts as flat: window=100 slope=0.001 earliest=500 variance=... gradient=..."
    )
    wd_speed: Literal["steady", "gradient"] | None = option(
        None,
        help="how fast it falls: steady (the default), or gradient: up to twice as fast while the gradient norm is "
        "below its mean before the fall, down to half as fast while it is above",
    )
    wd_lr_coupling: Literal["product", "lower"] | None = option(
        None,
        help="with a falling learning rate: product (the default): the weights shrink by rate x weight decay, which "
        "falls twice; lower: by the lower of the two curves",
    )
    task: (
        Literal[
            "general",
            "computer_vision",
            "image_classification",
            "object_detection",
            "image_generation",
            "image_segmentation",
            "natural_language",
            "text_generation",
            "text_classification",
            "translation",
            "question_answering",
            "multimodal",
            "image_captioning",
            "visual_question_answering",
            "text_to_image",
        ]
        | None
    ) = option(None, help="the task: --wd_decay_factor auto and --wd_transition_steps auto then go by it")

    def idle(self) -> dict[str, str]:
        """The options that do nothing beside the others, as far as these tell, each with the words that follow "has no
        effect": the optimizer may have a curve of its own."""
        if self.dynamic_weight_decay is False:
            return dict.fromkeys(READ_BY, " with --no-dynamic_weight_decay")
        if self.wd_schedule is None:
            return {}
        return {
            name: f" with --wd_schedule {self.wd_schedule}: it is for {', '.join(curves)}"
            for name, curves in READ_BY.items()
            if self.wd_schedule not in curves
        }

    def given(self) -> dict[str, object]:
        """What the user set of the curve itself, by name."""
        curve = {name: value for name, value in vars(self).items() if name.startswith("wd_")}
        nothing = (None, False, ())  # compared by identity: 0.0 == False
        return {name: value for name, value in curve.items() if not any(value is none for none in nothing)}
