"""The loss of a slider's batch: noise → partly denoised latents → the base's predictions → the target → the loss.

Gandikota et al. 2023: Erasing Concepts from Diffusion Models, arXiv 2303.07345; Concept Sliders, arXiv 2311.12092.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.data.dataset import Draw
from library.data.sources.prompts import PromptBatch
from library.diffusion.noise import draw_noise
from library.diffusion.process import Predict, Predicted, Process
from library.gpu import to_device
from library.losses.slider import slider_target
from library.losses.term import total
from library.rng import python_random, without_dropout
from library.training.step import BatchLoss, Objective, tell_noise

if TYPE_CHECKING:
    from library.data.dataset import Batch
    from library.models.family import ModelFamily
    from networks.network import TrainableNetwork

Condition = dict[str, Tensor]
Conditions = Callable[..., Condition]
"""See `_condition`; of one batch."""


def denoising_steps(seed: int, draw: Draw, most: int) -> int:
    """How many of the `most` steps a batch is denoised, uniform in 1 … most - 1. `draw`: its first."""
    key = (seed, draw.epoch, draw.repeat, draw.sample.key, "denoising steps")
    return python_random(*key).randrange(1, most)


def level_after(process: Process, steps: int, most: int) -> Tensor:
    """The noise level [1] after some of `most` equal steps, from the highest level on."""
    return process.at(torch.tensor([process.steps - 1 - steps * process.steps // most]))


@dataclass(frozen=True)
class SliderLoss:
    """A `library.training.step.BatchLossOf` for batches of prompts.

    steps: from noise to a picture, of which a random number is made. guidance: of the classifier-free guidance in them.
    """

    network: TrainableNetwork
    steps: int
    guidance: float

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
    ) -> BatchLoss:
        """The loss of the batch. All but one of the forward passes are without gradients."""
        assert isinstance(batch, PromptBatch)
        setting, process, conditions = batch.setting, objective.process, partial(_condition, batch, family, device)
        count = denoising_steps(seed, batch.samples[0], self.steps)
        told = partial(tell_noise, at_noise, process)
        latents = _noise(batch, family, objective, seed, device)
        with torch.no_grad():
            with self.network.at(setting.multiplier), without_dropout(self.network):
                latents = self._denoised(latents, count, process, family.predict, conditions, batch, told)
            level = level_after(process, count, self.steps).expand(len(latents))
            with self.network.off():
                target = _target(latents, level, family.predict, conditions, batch)
        told(level)
        condition = conditions(setting.target)
        with self.network.at(setting.multiplier):
            prediction = family.predict(latents, to_device(level, device), condition)
        seen = Predicted(prediction, target, latents, level, condition)
        per_sample = total((*objective.more, objective.main), seen, batch)
        return BatchLoss(per_sample.mean(), per_sample, level)

    def _denoised(
        self,
        latents_BCHW: Tensor,
        count: int,
        process: Process,
        predict: Predict,
        conditions: Conditions,
        batch: PromptBatch,
        told: Callable[[Tensor], None],
    ) -> Tensor:
        """The latents after `count` steps from noise towards a picture of the target, with the network as it is."""
        setting, size = batch.setting, len(latents_BCHW)
        prompts = (setting.target,) if self.guidance == 1 else (setting.unconditional, setting.target)
        condition = conditions(*prompts)
        for number in range(count):
            level, following = (level_after(process, at, self.steps).expand(size) for at in (number, number + 1))
            told(level.repeat(len(prompts)))
            levels = to_device(level, latents_BCHW.device).repeat(len(prompts))
            predictions = predict(latents_BCHW.repeat(len(prompts), 1, 1, 1), levels, condition).float()
            guided = predictions[-size:]
            if len(prompts) == 2:
                plain = predictions[:size]
                guided = plain + self.guidance * (guided - plain)
            latents_BCHW = process.denoised(latents_BCHW, guided, level, following)
        return latents_BCHW


def _noise(batch: PromptBatch, family: ModelFamily, objective: Objective, seed: int, device: torch.device) -> Tensor:
    """The noise that denoising starts from, [B, C, h, w] in fp32, each sample's from its own key."""
    width, height = (side // family.latents.factor for side in batch.target_size)
    zeros = torch.zeros(len(batch.samples), family.latents.channels, height, width, device=device)
    return draw_noise(objective.noise, zeros, seed, batch.samples)[0]


@torch.no_grad()
def _condition(batch: PromptBatch, family: ModelFamily, device: torch.device, *prompts: str) -> Condition:
    """The condition of the batch for each of these prompts, one after the other: [prompts · B, …]. From the cache, or,
    in a dry run, encoded now."""
    each = [text for text in prompts for _ in batch.samples]
    texts = family.encode_prompts(each) if batch.texts is None else batch.texts.get(each)
    return family.condition(
        {name: to_device(value, device) for name, value in texts.items()},
        original_sizes=batch.original_sizes * len(prompts),
        crops=batch.crops * len(prompts),
        target_size=batch.target_size,
    )


def _target(
    latents_BCHW: Tensor, level_B: Tensor, predict: Predict, conditions: Conditions, batch: PromptBatch
) -> Tensor:
    """The target of the batch, in fp32: the different prompts of it in one pass of the base model."""
    setting = batch.setting
    prompts = tuple(dict.fromkeys((setting.neutral, setting.positive, setting.unconditional)))
    prompts = prompts if setting.guidance_scale else (setting.neutral,)
    levels = to_device(level_B, latents_BCHW.device).repeat(len(prompts))
    predictions = predict(latents_BCHW.repeat(len(prompts), 1, 1, 1), levels, conditions(*prompts)).float()
    of = dict(zip(prompts, predictions.chunk(len(prompts)), strict=True))
    if not setting.guidance_scale:
        return of[setting.neutral]
    return slider_target(
        *(of[text] for text in (setting.neutral, setting.positive, setting.unconditional)),
        action=setting.action,
        guidance_scale=setting.guidance_scale,
    )
