"""The loss on held-out images, with the same noise every time, so that two measurements can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import rng
from library.diffusion.process import Predicted, predict_and_target
from library.gpu import to_device
from library.training.step import condition_of

if TYPE_CHECKING:
    from library.data.dataset import Batch
    from library.models.family import ModelFamily

ImageLoss = Callable[[Predicted, Tensor | None], Tensor]
"""(a prediction and its target, masks [B, 1, h, w] or None) → the loss of each image, [B]."""


@torch.no_grad()
def losses_of_batch(
    family: ModelFamily, batch: Batch, timesteps: Sequence[int], *, seed: int, device: torch.device, loss: ImageLoss
) -> dict[int, Tensor]:
    """`image_losses` at each of these steps of a batch whose latents are cached: the means of their distributions."""
    assert batch.moments is not None, "the latents are cached"
    latents = to_device(batch.moments[0], device).float()
    condition = condition_of(batch, family, device, train_text=False)
    keys = [draw.sample.key for draw in batch.samples]

    def masked(seen: Predicted) -> Tensor:
        return loss(seen, batch.masks)

    return {t: image_losses(family, latents, condition, t, keys=keys, seed=seed, loss=masked) for t in timesteps}


@torch.no_grad()
def image_losses(
    family: ModelFamily,
    latents_BCHW: Tensor,
    condition: Mapping[str, Tensor],
    step: int,
    *,
    keys: Sequence[rng.Key],
    seed: int,
    loss: Callable[[Predicted], Tensor],
) -> Tensor:
    """`loss` of each image at the noise level of a step of the family's process, [B]. The noise of an image is keyed by
    (seed, its key, step), so it does not depend on the batch or on earlier random draws.

    `loss`: a prediction and its target → [B].
    """
    shape, process = latents_BCHW.shape[1:], family.process
    noise = torch.stack(
        [torch.randn(shape, generator=rng.torch_generator(seed, key, step, "validation")) for key in keys]
    )
    noise, level = to_device(noise, latents_BCHW.device), process.at(torch.full((len(keys),), step))
    return loss(predict_and_target(process, family.predict, latents_BCHW, noise, level, condition))
