"""One micro-batch → its loss. Nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from library import rng
from library.data.caches.memory import refuse_non_finite
from library.diffusion.draws import generator, stacked_normal
from library.diffusion.noise import Noise, draw_noise
from library.diffusion.process import Process, predict_and_target
from library.gpu import to_device
from library.losses.main import MainLoss
from library.losses.term import LossTerm, total

if TYPE_CHECKING:
    from library.data.dataset import Batch, Draw
    from library.models.family import ModelFamily

Level = Callable[[torch.Generator, tuple[int, int]], float]


@dataclass(frozen=True)
class Objective:
    """The objective of training.

    level: draws a noise level with a generator, for latents of a size (height, width). steps: the trained range of the
    process's steps, the end excluded. noise: the kinds of noise.
    main: the loss that validation measures as well. more: further terms of the training loss.
    """

    process: Process
    level: Level
    steps: tuple[int, int]
    noise: Noise
    main: MainLoss
    more: tuple[LossTerm, ...] = ()

    def levels(self, seed: int, draws: Sequence[Draw], size: tuple[int, int]) -> Tensor:
        """The noise level of each of these draws, [B], on the CPU."""
        return self.process.stacked([self.level(generator(seed, draw, "timestep"), size) for draw in draws])


class BatchLoss(NamedTuple):
    """The loss of a batch: `loss` is the mean of `per_sample`."""

    loss: Tensor  # a scalar in fp32
    per_sample: Tensor  # [B], each with its weights
    t: Tensor  # [B], the noise levels drawn; on the CPU


class BatchLossOf(Protocol):
    """A function as `batch_loss`: from a batch to its loss, with the network's current weights."""

    def __call__(
        self,
        batch: Batch,
        family: ModelFamily,
        objective: Objective,
        *,
        seed: int,
        device: torch.device,
        train_text: bool,
        at_noise: Callable[[Tensor], None] | None = None,
    ) -> BatchLoss: ...


def latents_of(batch: Batch, family: ModelFamily, seed: int, device: torch.device) -> Tensor:
    """A draw from each image's latent distribution: [B, C, h, w], fp32, scaled as the network expects.

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
    """UserError if the VAE returns latents that are not finite for the images of this batch.

    Called only for a batch whose loss is not finite: checking every batch would make the GPU wait for the host. Latents
    in a cache were checked when they were encoded.
    """
    if batch.pixels is None:
        return
    with torch.no_grad():
        mean, std = family.encode_images(to_device(batch.pixels, device))
    refuse_non_finite([str(draw.sample.path) for draw in batch.samples], mean, std)


def condition_of(batch: Batch, family: ModelFamily, device: torch.device, *, train_text: bool) -> dict[str, Tensor]:
    """The network's condition: the texts, from the cache or encoded now, and the sizes and crops of the images."""
    if batch.condition is not None:
        texts = {name: to_device(value, device) for name, value in batch.condition.items()}
    else:
        with torch.set_grad_enabled(train_text):
            texts = family.encode_prompts(batch.captions)
    return family.condition(
        texts, original_sizes=batch.original_sizes, crops=batch.crops, target_size=batch.target_size
    )


def _shares(seed: int, draws: Sequence[Draw], purpose: str) -> list[float]:
    """A number in [0, 1) for each sample."""
    return [rng.python_random(seed, one.epoch, one.repeat, one.sample.key, purpose).random() for one in draws]


def tell_noise(at_noise: Callable[[Tensor], None] | None, process: Process, level_B: Tensor) -> None:
    """Tell a network that wants it the noise of each sample. `at_noise`: as `TrainableNetwork` has it."""
    if at_noise is not None:
        at_noise(process.bin_of(level_B, process.steps) / process.steps)


def batch_loss(
    batch: Batch,
    family: ModelFamily,
    objective: Objective,
    *,
    seed: int,
    device: torch.device,
    train_text: bool,
    at_noise: Callable[[Tensor], None] | None = None,
) -> BatchLoss:
    """The loss of the batch: the mean of its samples' weighted losses. `at_noise`: as `TrainableNetwork` has it."""
    latents = latents_of(batch, family, seed, device)
    noise, added_noise = draw_noise(objective.noise, latents, seed, batch.samples)
    height, width = latents.shape[-2:]
    level = objective.levels(seed, batch.samples, (height, width))
    tell_noise(at_noise, objective.process, level)
    texts = condition_of(batch, family, device, train_text=train_text)
    condition = family.with_text_dropout(texts, lambda purpose: _shares(seed, batch.samples, purpose))
    seen = predict_and_target(
        objective.process, family.predict, latents, noise, level, condition, added_BCHW=added_noise
    )
    per_sample = total((*objective.more, objective.main), seen, batch)
    return BatchLoss(per_sample.mean(), per_sample, level)
