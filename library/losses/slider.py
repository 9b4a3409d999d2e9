"""The target of a slider: the base model's own prediction, moved along the difference of two prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def slider_target(
    neutral_BCHW: Tensor, positive_BCHW: Tensor, unconditional_BCHW: Tensor, *, action: str, guidance_scale: float
) -> Tensor:
    """neutral - g · (positive - unconditional) for the action "erase", neutral + g · (…) for "enhance".

    Each is the frozen base model's prediction for the same noisy latents with that prompt. Predictions of noise and of
    velocity are both linear in the noise at fixed latents, so the formula is the same for either.
    Gandikota et al. 2023, arXiv 2303.07345, eq. 6 (erasing); 2311.12092, eq. 8 (sliders).
    """
    moved = guidance_scale * (positive_BCHW - unconditional_BCHW)
    return neutral_BCHW - moved if action == "erase" else neutral_BCHW + moved
