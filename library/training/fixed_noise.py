"""The loss on images that are not trained, with the same noise every time, so that two numbers can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import rng
from library.diffusion import ddpm
from library.gpu import to_device

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
    noise, t_B = to_device(noise, device), torch.full((len(keys),), t)
    noisy = ddpm.add_noise(latents_BCHW, noise, t_B, family.alphas_cumprod)
    target = ddpm.prediction_target(family.prediction_type, latents_BCHW, noise, t_B, family.alphas_cumprod)
    prediction = family.predict(noisy, to_device(t_B, device), condition)
    return loss(prediction.float(), target.float(), t_B)
