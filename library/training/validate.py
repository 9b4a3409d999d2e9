"""The loss on images that are not trained, with the same noise every time, so that two numbers can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import rng
from library.diffusion import ddpm
from library.losses.l2 import l2

if TYPE_CHECKING:
    from library.models.family import ModelFamily

BINS = 5


def middles(low: int = 0, high: int = 1000) -> tuple[int, ...]:
    """The middle of each of five equal parts of the timesteps low … high - 1; fewer where there are fewer."""
    return tuple(dict.fromkeys(low + (2 * part + 1) * (high - low) // (2 * BINS) for part in range(BINS)))


@torch.no_grad()
def image_losses(
    family: ModelFamily,
    latents_BCHW: Tensor,
    condition: Mapping[str, Tensor],
    t: int,
    *,
    keys: Sequence[rng.Key],
    seed: int,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """`loss` of each image at timestep t, [B]. The noise of an image is keyed by (seed, its key, t), so it does not
    depend on the batch or on anything drawn before.

    `loss`: (prediction, target, t [B]) → [B].
    """
    shape, device = latents_BCHW.shape[1:], latents_BCHW.device
    noise = torch.stack([torch.randn(shape, generator=rng.torch_generator(seed, key, t, "validation")) for key in keys])
    noise, t_B = noise.to(device), torch.full((len(keys),), t)
    noisy = ddpm.add_noise(latents_BCHW, noise, t_B, family.alphas_cumprod)
    target = ddpm.prediction_target(family.prediction_type, latents_BCHW, noise, t_B, family.alphas_cumprod)
    prediction = family.predict(noisy, t_B.to(device), condition)
    return loss(prediction.float(), target.float(), t_B)


def mean_squares(prediction: Tensor, target: Tensor, t_B: Tensor) -> Tensor:
    """The mean squared error of each image, [B]."""
    return l2(prediction, target).mean(dim=(1, 2, 3))


@torch.no_grad()
def fixed_noise_loss(
    family: ModelFamily, latents_NCHW: Tensor, captions: Sequence[str], *, seed: int, batch_size: int = 16
) -> dict[int, float]:
    """Mean squared error per timestep of `middles()`, over all images; the key of image i is i.

    UNet and text encoder must be loaded.
    """
    assert family.unet is not None
    losses = {}
    device = next(family.unet.parameters()).device
    for t in middles():
        total = 0.0
        for start in range(0, len(latents_NCHW), batch_size):
            latents = latents_NCHW[start : start + batch_size].to(device)
            keys = range(start, start + len(latents))
            size = latents.shape[-1] * family.vae_factor, latents.shape[-2] * family.vae_factor
            condition = family.condition(
                family.encode_prompts([captions[i] for i in keys]),
                original_sizes=[size] * len(latents),
                crops=[(0, 0)] * len(latents),
                target_size=size,
            )
            losses_B = image_losses(family, latents, condition, t, keys=keys, seed=seed, loss=mean_squares)
            total += losses_B.sum().item()
        losses[t] = total / len(latents_NCHW)
    return losses
