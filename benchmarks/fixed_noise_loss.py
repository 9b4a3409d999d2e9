"""How well a model knows images: the mean squared error, with the same noise for all that are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from library.diffusion.process import Predicted, middles
from library.losses.l2 import l2
from library.models.family import ModelFamily
from library.training.fixed_noise import image_losses


def mean_squares(seen: Predicted) -> Tensor:
    """The mean squared error of each image, [B]."""
    return l2(seen.prediction_BCHW.float(), seen.target_BCHW.float()).mean(dim=(1, 2, 3))


@torch.no_grad()
def fixed_noise_loss(
    family: ModelFamily, latents_NCHW: Tensor, captions: Sequence[str], *, seed: int, batch_size: int = 16
) -> dict[int, float]:
    """Mean squared error per timestep of `middles()`, over all images; the key of image i is i.

    Denoiser and text encoder must be loaded.
    """
    totals = dict.fromkeys(middles(0, family.process.steps), 0.0)
    device = next(family.components["denoiser"].parameters()).device
    for start in range(0, len(latents_NCHW), batch_size):
        latents = latents_NCHW[start : start + batch_size].to(device)
        keys = range(start, start + len(latents))
        size = latents.shape[-1] * family.latents.factor, latents.shape[-2] * family.latents.factor
        condition = family.condition(
            family.encode_prompts([captions[i] for i in keys]),
            original_sizes=[size] * len(latents),
            crops=[(0, 0)] * len(latents),
            target_size=size,
        )
        for t in totals:
            losses_B = image_losses(family, latents, condition, t, keys=keys, seed=seed, loss=mean_squares)
            totals[t] += losses_B.sum().item()
    return {t: total / len(latents_NCHW) for t, total in totals.items()}
