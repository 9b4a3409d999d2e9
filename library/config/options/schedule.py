"""The options of the learning-rate schedule, with kohya's names, defaults and meanings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.config.fields import option, read_schedule, read_steps

# Which schedules read which of these options, as in kohya's scripts.
_READ_BY = {
    "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
    "lr_decay_steps": ("warmup_stable_decay",),
}


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Learning-rate schedule"""

    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "cosine_with_min_lr",
        "inverse_sqrt",
        "warmup_stable_decay",
        "piecewise_constant",
        "exponential",
        "step",
        "rex",
        "adafactor",
    ] = option("constant", read=read_schedule, help="how the learning rate changes; adafactor: by that optimizer")
    lr_warmup_steps: int | float | str = option(
        0, read=read_steps, help="warm-up, in steps (500), as a ratio of all steps (0.05) or in percent (5%)"
    )
    lr_decay_steps: int | float | str = option(
        0, read=read_steps, help="the last part of warmup_stable_decay, in which the rate falls; as --lr_warmup_steps"
    )
    lr_scheduler_num_cycles: int = option(
        1, minimum=1, help="cycles of cosine_with_restarts, cosine_with_min_lr and of warmup_stable_decay's decay"
    )
    lr_scheduler_power: float = option(1.0, minimum=0, help="power of polynomial")
    lr_scheduler_timescale: int | None = option(
        None, minimum=1, zero_is_unset=True, help="timescale of inverse_sqrt (default: the warm-up, or 10000 steps)"
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, minimum=0, maximum=1, help="where cosine_with_min_lr and warmup_stable_decay end, as a share of the rate"
    )
    lr_scheduler_type: str = option(
        "", help="a class instead: one of torch.optim.lr_scheduler (CosineAnnealingLR) or package.module.Class"
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (),
        help="settings of the class or the schedule: T_max=100, or step_rules=1:500,0.1:900,0.01 (piecewise_constant), "
        "gamma=0.999 (exponential), step_size=500 gamma=0.5 (step)",
    )

    def idle(self) -> dict[str, str]:
        """The options that the schedule does not read, each with the words that follow "has no effect"."""
        return {
            option: f" with {self._chosen}: it is for {', '.join(readers)}"
            for option, readers in _READ_BY.items()
            if self.lr_scheduler_type or self.lr_scheduler not in readers
        }

    @property
    def _chosen(self) -> str:
        custom = self.lr_scheduler_type
        return f"--lr_scheduler_type {custom}" if custom else f"--lr_scheduler {self.lr_scheduler}"

    def without_effect(self) -> list[str]:
        """One sentence for each option that was changed from its default and that the schedule does not read."""
        fields = type(self).__dataclass_fields__
        sentences = [
            f"--{option} {getattr(self, option)} has no effect{why}"
            for option, why in self.idle().items()
            if getattr(self, option) != fields[option].default
        ]
        if self.lr_scheduler_type and self.lr_scheduler != "constant":
            sentences.append(f"--lr_scheduler {self.lr_scheduler} has no effect: {self._chosen} is used")
        return sentences
