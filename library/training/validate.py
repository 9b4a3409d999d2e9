"""The loss on images that were held out, with the same noise every time, so that two numbers can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import rng
from library.diffusion import ddpm
from library.losses.l2 import l2

if TYPE_CHECKING:
    from library.models.family import ModelFamily

# the middle of five equal parts of 0 ... 999
TIMESTEPS = (100, 300, 500, 700, 900)


@torch.no_grad()
def fixed_noise_loss(
    family: ModelFamily, latents_NCHW: Tensor, captions: Sequence[str], *, seed: int, batch_size: int = 16
) -> dict[int, float]:
    """Mean squared error per timestep of `TIMESTEPS`, over all images; the noise of image i is keyed by (seed, i, t).

    UNet and text encoder must be loaded. Nothing is drawn from a running stream, so training is not disturbed.
    """
    assert family.unet is not None
    losses = {}
    device = next(family.unet.parameters()).device
    table = family.alphas_cumprod
    for t in TIMESTEPS:
        total = 0.0
        for start in range(0, len(latents_NCHW), batch_size):
            latents = latents_NCHW[start : start + batch_size].to(device)
            indices = range(start, start + len(latents))
            noise = torch.stack(
                [
                    torch.randn(latents.shape[1:], generator=rng.torch_generator(seed, i, t, "validation"))
                    for i in indices
                ]
            ).to(device)
            t_B = torch.full((len(latents),), t)
            noisy = ddpm.add_noise(latents, noise, t_B, table)
            target = ddpm.prediction_target(family.prediction_type, latents, noise, t_B, table)
            condition = family.encode_prompts([captions[i] for i in indices])
            prediction = family.predict(noisy, t_B.to(device), condition)
            total += l2(prediction.float(), target.float()).mean(dim=(1, 2, 3)).sum().item()
        losses[t] = total / len(latents_NCHW)
    return losses
