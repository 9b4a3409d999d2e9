"""The options that choose settings for the user, or help to choose them."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.fields import option
from library.errors import UserError

_START, _END, _STEPS = 1e-7, 10.0, 100


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """Presets and advice"""

    preset: tuple[str, ...] = option(
        (), help="settings that ship with the program, by name, the later ones on top; all else wins over them (ours)"
    )
    list_presets: bool = option(False, help="say which presets there are, instead of training (ours)")
    recommend: bool = option(
        False, help="look at data and model and propose rank, rates, steps and so on, with reasons; do not train (ours)"
    )
    find_lr: bool = option(
        False, help="look for the learning rate: train while it grows, plot the loss, suggest one, keep nothing (ours)"
    )
    find_lr_start: float = option(_START, minimum=0, help="the rate that --find_lr begins with (ours)")
    find_lr_end: float = option(_END, minimum=0, help="the rate at which --find_lr ends at the latest (ours)")
    find_lr_steps: int = option(
        _STEPS, minimum=20, maximum=10_000, help="the rates that --find_lr tries, one step each (ours)"
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
