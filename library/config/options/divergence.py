"""The options about a loss or a gradient that is not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.config.fields import option


@dataclass(frozen=True, kw_only=True)
class DivergenceOptions:
    """Divergence"""

    on_divergence: Literal["stop", "skip", "rollback"] = option(
        "stop",
        help="when a loss or gradient is NaN or infinite: stop before the step is made; skip that step; or rollback: "
        "go back to where the run was last saved, with half the learning rates (ours)",
    )
    divergence_limit: int = option(
        10, minimum=1, help="how often a run may skip or go back before it stops all the same (ours)"
    )
