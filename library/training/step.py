"""One micro-batch → its loss. Nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from library.data.caches.memory import refuse_non_finite
from library.diffusion import ddpm
from library.diffusion.draws import stacked_normal, stacked_timesteps
from library.diffusion.noise import Noise, draw_noise
from library.gpu import to_device

if TYPE_CHECKING:
    from library.data.dataset import Batch
    from library.models.family import ModelFamily


@dataclass(frozen=True)
class Objective:
    """What is minimised. All that depends on the timestep only is a table with an entry for each of them, [T].

    `loss`: (prediction, target) → loss per element, or with `thresholds` (prediction, target, threshold [B, 1, 1, 1]).
    `weights`: of the samples, None for 1. `timestep`: draws one. `noise`: the kinds of noise.
    """

    prediction_type: str
    alphas_cumprod: Tensor
    loss: Callable[..., Tensor]
    timestep: Callable[[torch.Generator], int]
    noise: Noise
    thresholds: Tensor | None = None
    weights: Tensor | None = None


class BatchLoss(NamedTuple):
    """What a batch cost: `loss` is the mean of `per_sample`."""

    loss: Tensor  # a scalar in fp32
    per_sample: Tensor  # [B], each with its weights
    t: Tensor  # [B], the timesteps drawn; on the CPU


def latents_of(batch: Batch, family: ModelFamily, seed: int, device: torch.device) -> Tensor:
    """A draw from each image's latent distribution: [B, C, h, w], fp32, scaled as the UNet expects.

    The caches hold the distribution, so a cached run draws what an uncached one would.
    """
    if batch.moments is not None:
        mean, std = batch.moments
    else:
        assert batch.pixels is not None
        with torch.no_grad():
            mean, std = family.encode_images(to_device(batch.pixels, device))
    noise = to_device(stacked_normal(mean.shape[1:], seed, batch.samples, "vae"), device)
    return to_device(mean, device).float() + to_device(std, device).float() * noise


def refuse_broken_latents(batch: Batch, family: ModelFamily, device: torch.device) -> None:
    """UserError if the VAE gives no finite latents for the images of this batch.

    For a batch whose loss is not finite either: looking at every batch would let the GPU wait for the host. Latents in
    a cache were checked when they were encoded.
    """
    if batch.pixels is None:
        return
    with torch.no_grad():
        mean, std = family.encode_images(to_device(batch.pixels, device))
    refuse_non_finite([str(draw.sample.path) for draw in batch.samples], mean, std)


def condition_of(batch: Batch, family: ModelFamily, device: torch.device, *, train_text: bool) -> dict[str, Tensor]:
    """What the UNet is conditioned on: the text from the cache, or encoded now, and what the images were like."""
    if batch.condition is not None:
        texts = {name: to_device(value, device) for name, value in batch.condition.items()}
    else:
        with torch.set_grad_enabled(train_text):
            texts = family.encode_prompts(batch.captions)
    return family.condition(
        texts, original_sizes=batch.original_sizes, crops=batch.crops, target_size=batch.target_size
    )


def element_loss(objective: Objective, prediction_BCHW: Tensor, target_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """The loss of each element, [B, C, h, w], without any weight."""
    if objective.thresholds is None:
        return objective.loss(prediction_BCHW, target_BCHW)
    thresholds = objective.thresholds[t_B.to(objective.thresholds.device)].view(-1, 1, 1, 1)
    thresholds = to_device(thresholds, prediction_BCHW.device).to(prediction_BCHW)
    return objective.loss(prediction_BCHW, target_BCHW, thresholds)


def sample_losses(
    objective: Objective, prediction_BCHW: Tensor, target_BCHW: Tensor, t_B: Tensor, masks: Tensor | None
) -> Tensor:
    """The mean loss of each sample, [B], without the weights of samples and timesteps."""
    # fp32: squares of bf16 differences lose the small errors that late training is about
    per_element = element_loss(objective, prediction_BCHW.float(), target_BCHW.float(), t_B)
    if masks is not None:
        # what is masked counts as zero and stays in the mean, as in kohya: a small part weighs less than a whole image
        size = per_element.shape[2:]
        masks = to_device(masks, per_element.device).to(per_element)
        per_element = per_element * torch.nn.functional.interpolate(masks, size=size, mode="area")
    return per_element.mean(dim=(1, 2, 3))


def batch_loss(
    batch: Batch,
    family: ModelFamily,
    objective: Objective,
    *,
    seed: int,
    device: torch.device,
    train_text: bool,
    without: Callable[[], AbstractContextManager[None]],
) -> BatchLoss:
    """The loss of the batch; each sample weighted by its own weight and by its timestep's.

    `without()` is a context in which the network has no effect: what is predicted there is the target of samples with
    `diff_output_preservation`.
    """
    latents = latents_of(batch, family, seed, device)
    noise, added_noise = draw_noise(objective.noise, latents, seed, batch.samples)
    t = stacked_timesteps(objective.timestep, seed, batch.samples)
    noisy = ddpm.add_noise(latents, added_noise, t, objective.alphas_cumprod)
    target = ddpm.prediction_target(objective.prediction_type, latents, noise, t, objective.alphas_cumprod)

    condition = condition_of(batch, family, device, train_text=train_text)
    t_there = to_device(t, device)
    prediction = family.predict(noisy, t_there, condition)
    preserved = [i for i, draw in enumerate(batch.samples) if draw.sample.subset.diff_output_preservation]
    if preserved:
        rows = to_device(torch.tensor(preserved), device)
        of_preserved = {name: value[rows] for name, value in condition.items()}
        with torch.no_grad(), without():
            unchanged = family.predict(noisy[rows], t_there[rows], of_preserved)
        target = target.index_copy(0, rows, unchanged.to(target))

    per_sample = sample_losses(objective, prediction, target, t, batch.masks)
    weights = to_device(batch.loss_weights, device)
    if objective.weights is not None:
        weights = weights * to_device(objective.weights[t], device).to(weights)
    per_sample = per_sample * weights
    return BatchLoss(per_sample.mean(), per_sample, t)
