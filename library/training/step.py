"""One micro-batch → its loss. Nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import rng
from library.diffusion import ddpm

if TYPE_CHECKING:
    from library.data.dataset import Batch, Draw
    from library.models.family import ModelFamily


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    `loss`: (prediction, target) → loss per element. `weighting`: SNR(t) per sample → weight per sample, or None.
    """

    prediction_type: str
    alphas_cumprod: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    weighting: Callable[[Tensor], Tensor] | None = None


def stacked_normal(shape: Sequence[int], seed: int, draws: Sequence[Draw], purpose: str) -> Tensor:
    """Standard normal [B, *shape], each sample's from its own key; fp32 on the CPU, so the same on every device."""
    return torch.stack(
        [
            torch.randn(tuple(shape), generator=rng.torch_generator(seed, d.epoch, d.repeat, d.sample.key, purpose))
            for d in draws
        ]
    )


def draw_timesteps(seed: int, draws: Sequence[Draw]) -> Tensor:
    """t per sample [B], in 0 ... 999."""
    return torch.tensor(
        [ddpm.uniform_timestep(rng.torch_generator(seed, d.epoch, d.repeat, d.sample.key, "timestep")) for d in draws]
    )


def latents_of(batch: Batch, family: ModelFamily, seed: int, device: torch.device) -> Tensor:
    """A draw from each image's latent distribution: [B, C, h, w], fp32, scaled as the UNet expects.

    The caches hold the distribution, so a cached run draws what an uncached one would.
    """
    if batch.moments is not None:
        mean, std = batch.moments
    else:
        assert batch.pixels is not None
        with torch.no_grad():
            mean, std = family.encode_images(batch.pixels.to(device))
    noise = stacked_normal(mean.shape[1:], seed, batch.samples, "vae").to(device)
    return mean.to(device, torch.float32) + std.to(device, torch.float32) * noise


def condition_of(batch: Batch, family: ModelFamily, device: torch.device, *, train_text: bool) -> dict[str, Tensor]:
    """What the UNet is conditioned on: from the cache, or encoded now."""
    if batch.condition is not None:
        return {name: value.to(device) for name, value in batch.condition.items()}
    with torch.set_grad_enabled(train_text):
        return family.encode_prompts(batch.captions)


def batch_loss(
    batch: Batch,
    family: ModelFamily,
    objective: Objective,
    *,
    seed: int,
    device: torch.device,
    train_text: bool,
    without: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """Mean loss of the batch, a scalar in fp32; each sample weighted by its own weight and by the objective's.

    `without()` is a context in which the network has no effect: what is predicted there is the target of samples with
    `diff_output_preservation`.
    """
    latents = latents_of(batch, family, seed, device)
    noise = stacked_normal(latents.shape[1:], seed, batch.samples, "noise").to(device)
    t = draw_timesteps(seed, batch.samples)
    noisy = ddpm.add_noise(latents, noise, t, objective.alphas_cumprod)
    target = ddpm.prediction_target(objective.prediction_type, latents, noise, t, objective.alphas_cumprod)

    condition = condition_of(batch, family, device, train_text=train_text)
    prediction = family.predict(noisy, t.to(device), condition)
    preserved = [i for i, draw in enumerate(batch.samples) if draw.sample.subset.diff_output_preservation]
    if preserved:
        of_preserved = {name: value[preserved] for name, value in condition.items()}
        target = target.clone()  # it can be the noise itself
        with torch.no_grad(), without():
            target[preserved] = family.predict(noisy[preserved], t[preserved].to(device), of_preserved).to(target)

    # fp32: squares of bf16 differences lose the small errors that late training is about
    per_sample = objective.loss(prediction.float(), target.float()).mean(dim=(1, 2, 3))
    weights = batch.loss_weights.to(device)
    if objective.weighting is not None:
        snr = ddpm.signal_to_noise(objective.alphas_cumprod)[t]
        weights = weights * objective.weighting(snr).to(weights)
    return (per_sample * weights).mean()
