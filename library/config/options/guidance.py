"""The options that choose settings for the user, or help to choose them."""

from __future__ import annotations

from dataclasses import dataclass

from library.config import wishes
from library.config.fields import option, read_fit, read_memory
from library.errors import UserError

_START, _END, _STEPS = 1e-7, 10.0, 100


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """Presets and advice"""

    preset: tuple[str, ...] = option(
        (),
        help="settings that ship with the program, by name; later ones win over earlier ones, your own over all (ours)",
    )
    list_presets: bool = option(False, help="list the presets instead of training (ours)")
    recommend: str = option(
        "",
        alone=wishes.BY_DATA,
        read=wishes.read,
        joined_by=",",
        help="recommend method, rank, rates, steps and so on for this data, model and card, with reasons; do not "
        "train. It may be told style, character or concept; easy, normal or hard; and the time there is with that of "
        "a step: style,hard,2h,1.4s (ours)",
    )
    find_lr: bool = option(
        False,
        help="find a learning rate: train while it grows, plot the loss, suggest a rate, discard the weights (ours)",
    )
    find_lr_start: float = option(_START, minimum=0, help="the first rate of --find_lr (ours)")
    find_lr_end: float = option(
        _END, minimum=0, help="the last rate of --find_lr, unless the loss breaks before (ours)"
    )
    find_lr_steps: int = option(
        _STEPS, minimum=20, maximum=10_000, help="the number of rates that --find_lr tries, one step each (ours)"
    )

    gpu_memory: str | None = option(
        None, read=read_memory, help="the GPU memory to plan for, such as 12GB (default: that of the GPU) (ours)"
    )
    fit: str = option(
        "",
        alone="auto",
        read=read_fit,
        help="set the options that need less memory, so that the run fits into so much (8GB), or into the GPU's free "
        "memory (auto): the fastest combination that fits; what you set yourself stays (ours)",
    )

    def __post_init__(self) -> None:
        defaults = {"find_lr_start": _START, "find_lr_end": _END, "find_lr_steps": _STEPS}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        if changed and not self.find_lr:
            raise UserError(f"--{changed[0]} has no effect without --find_lr")
        if not 0 < self.find_lr_start * 10 <= self.find_lr_end:
            raise UserError(
                f"--find_lr_start {self.find_lr_start:g} must be above 0, and --find_lr_end {self.find_lr_end:g} at "
                "least ten times as much"
            )
