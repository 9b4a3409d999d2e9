"""The data of a slider: prompts in place of images, in the same planned and keyed order.

Each setting of the prompts is a sample without an image. An epoch is a number of rounds, each of which has a batch of
every setting, in an order of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.config.data.dataset_config import DatasetSpec
from library.data.buckets import Placement
from library.data.caches.memory import TextCache, encode_captions
from library.data.dataset import Batch, Draw, TrainingData
from library.data.loader import PixelLoader
from library.data.plan import Group, PlannedBatch
from library.data.prepared import Prepared
from library.data.samples import Sample, Size
from library.rng import python_random

if TYPE_CHECKING:
    from library.config.data.slider_prompts import Setting
    from library.data.caches.disk import Disk

ROUNDS = 100
"""Of an epoch: enough that steps of several batches divide it almost evenly."""
_STEP = 64
"""Pixels: drawn sides are multiples of it."""


@dataclass(kw_only=True)
class PromptBatch(Batch):
    """One setting, `len(samples)` times, each with noise of its own. It has neither pixels nor moments.

    `texts`: the text encoders' states of all prompts; None: they are not encoded yet.
    """

    setting: Setting
    texts: TextCache | None


def prepared(settings: Sequence[Setting], datasets: Sequence[DatasetSpec], *, file: Path) -> Prepared:
    """One sample and one group for each setting; `datasets`: one for each as well, with its size and batch size."""
    samples = [
        Sample(
            path=file,
            key=f"setting {number}",
            caption=json.dumps(setting.facts),  # so that the hash of a run's data is about them
            subset=spec.subsets[0],
            size=setting.size,
            repeats=setting.batch_size * ROUNDS,
        )
        for number, (setting, spec) in enumerate(zip(settings, datasets, strict=True))
    ]
    return Prepared(
        samples=samples,
        placements=[Placement(setting.size, setting.size) for setting in settings],
        groups=[
            Group(number, setting.size, setting.batch_size, ((number, setting.batch_size * ROUNDS),))
            for number, setting in enumerate(settings)
        ],
        summaries=[],
    )


class PromptData(TrainingData):
    """As `TrainingData`, of prompts. A batch is a function of (seed, epoch, planned batch)."""

    def __init__(
        self, prepared: Prepared, settings: Sequence[Setting], *, seed: int, batches_per_step: int, total_steps: int
    ) -> None:
        super().__init__(prepared, seed=seed, batches_per_step=batches_per_step, total_steps=total_steps)
        self.settings = tuple(settings)
        self.texts: TextCache | None = None

    def plan(self, epoch: int) -> list[PlannedBatch]:
        planned: list[PlannedBatch] = []
        for number in range(ROUNDS):
            order = list(range(len(self.settings)))
            python_random(self.seed, epoch, number, "round").shuffle(order)
            planned += [self._planned(setting, number) for setting in order]
        return planned

    def _planned(self, setting: int, number: int) -> PlannedBatch:
        count = self.settings[setting].batch_size
        return tuple((setting, number * count + place) for place in range(count))

    def captions(self) -> list[str]:
        """All prompts."""
        return list(dict.fromkeys(prompt for setting in self.settings for prompt in setting.prompts))

    def cache_latents(
        self,
        encode: Callable[[Tensor], tuple[Tensor, Tensor]],
        *,
        batch_size: int,
        disk: Disk | None = None,
        beside: Sequence[TrainingData] = (),
    ) -> None:
        """No-op: there are no images."""

    def cache_captions(
        self,
        encode: Callable[[list[str]], dict[str, Tensor]],
        *,
        batch_size: int,
        disk: Disk | None = None,
        beside: Sequence[TrainingData] = (),
    ) -> None:
        """Encode all prompts, in memory."""
        self.texts = encode_captions(self.captions(), encode, batch_size=batch_size)

    def loader(self, *, workers: int, world_size: int = 1, persistent: bool = False, pin: bool = False) -> PixelLoader:
        """One without workers: there is nothing to load."""
        return PixelLoader(workers=0, most_batches=0)

    def batches(self, plan: Sequence[PlannedBatch], *, epoch: int, loader: PixelLoader) -> Iterator[PromptBatch]:
        for planned in plan:
            draws = [Draw(self.samples[index], epoch, repeat) for index, repeat in planned]
            yield self._prompt_batch(self.settings[planned[0][0]], draws)

    def _prompt_batch(self, setting: Setting, draws: list[Draw]) -> PromptBatch:
        size, count = self._size(setting, draws[0]), len(draws)
        original, crop = self._crop(setting, draws[0], size)
        return PromptBatch(
            samples=draws,
            pixels=None,
            moments=None,
            captions=[setting.target] * count,
            condition=None,
            loss_weights=torch.full((count,), setting.weight),
            original_sizes=[original] * count,
            crops=[crop] * count,
            target_size=size,
            setting=setting,
            texts=self.texts,
        )

    def _random(self, draw: Draw, purpose: str) -> Callable[[int, int], int]:
        """Draws a whole number, both ends included."""
        return python_random(self.seed, draw.epoch, draw.repeat, draw.sample.key, purpose).randint

    def _size(self, setting: Setting, draw: Draw) -> Size:
        """The setting's size or, with `dynamic_resolution`, sides from half of it on, as in kohya's script."""
        width, height = setting.size
        if not setting.dynamic_resolution or width != height or width <= _STEP:
            return setting.size
        randint = self._random(draw, "resolution")
        least, most = max(1, width // 2 // _STEP), width // _STEP
        return randint(least, most) * _STEP, randint(least, most) * _STEP

    def _crop(self, setting: Setting, draw: Draw, size: Size) -> tuple[Size, tuple[int, int]]:
        """The original size and the (left, top) of the crop that SDXL is told: none, or with `dynamic_crops` those of
        a crop from an image up to three times as large."""
        if not setting.dynamic_crops:
            return size, (0, 0)
        scale = 1 + 2 * python_random(self.seed, draw.epoch, draw.repeat, draw.sample.key, "scale").random()
        width, height = (int(side * scale) for side in size)
        randint = self._random(draw, "crop")
        return (width, height), (randint(0, width - size[0]), randint(0, height - size[1]))
