"""The options of the running average of the network's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.config.fields import option
from library.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """Average of the weights (EMA)"""

    ema_decay: float | None = option(
        None,
        minimum=0,
        maximum=1,
        help="keep a running average of the LoRA with this decay, at step n at most (1+n)/(10+n); "
        "0.99 to 0.9999 are usual (ours)",
    )
    ema_for: tuple[Literal["validate", "sample", "save"], ...] = option(
        (), help="the purposes for which the average replaces the weights (default: all three) (ours)"
    )

    def __post_init__(self) -> None:
        if self.ema_decay == 1:
            raise UserError("--ema_decay 1: nothing would ever enter the average; the usual values are 0.99 to 0.9999")
        if self.ema_for and self.ema_decay is None:
            raise UserError("--ema_for needs --ema_decay: without it there is no average; 0.99 is usual for short runs")

    @property
    def purposes(self) -> tuple[str, ...]:
        """The purposes that the average is used for."""
        return self.ema_for or ("validate", "sample", "save")
