"""The options that keep a network from forgetting; those that measure it are validation's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.config.fields import option
from library.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ForgettingOptions:
    """Against forgetting (ours)"""

    distillation_weight: float = option(
        0.0,
        minimum=0,
        help="add the distance to the predictions of --network_weights, as that file is, times this; 1 counts it like "
        "the images",
    )
    distillation_schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", help="how --distillation_weight falls to 0 by the end of the run"
    )
    ewc_data: tuple[str, ...] = option(
        (),
        help="earlier images, as folders or data set files (.toml): weights that matter for them are held where they "
        "are at the start (elastic weight consolidation)",
    )
    ewc_lambda: float | None = option(
        None, minimum=0, help="how firmly; the default is computed, see docs/forgetting.md"
    )
    ewc_images: int = option(100, minimum=1, help="look at up to this many images of --ewc_data, each four times")

    def __post_init__(self) -> None:
        if self.ewc_lambda == 0:
            raise UserError("--ewc_lambda must be above 0; leave --ewc_data out to hold nothing")

    def idle(self) -> dict[str, str]:
        """The options without effect beside the others, each with the words that follow "has no effect"."""
        needs = {
            "distillation_schedule": (self.distillation_weight > 0, "--distillation_weight"),
            "ewc_lambda": (bool(self.ewc_data), "--ewc_data"),
            "ewc_images": (bool(self.ewc_data), "--ewc_data"),
        }
        return {name: f" without {other}" for name, (works, other) in needs.items() if not works}
