"""The loss on held-out images, with the same noise every time, so that two measurements can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import rng
from library.diffusion.process import Predicted, predict_and_target
from library.gpu import to_device

if TYPE_CHECKING:
    from library.models.family import ModelFamily


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
