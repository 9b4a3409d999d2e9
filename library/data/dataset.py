"""Samples, buckets and caches → batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from library.data.caches.disk import Disk, DiskLatents, DiskTexts, cache_captions, cache_images
from library.data.caches.masks import MaskCache, cache_masks
from library.data.caches.memory import LatentCache, TextCache, encode_captions, encode_images
from library.data.captions import Sight, as_written, caption_text, is_static
from library.data.loader import PixelLoader
from library.data.plan import PlannedBatch, epoch_batches
from library.data.prepared import Prepared
from library.data.samples import Sample, Size
from library.data.views import View, drawn_view, fixed_view
from library.rng import python_random

if TYPE_CHECKING:
    from library.config.data.dataset_config import SubsetSpec


class Draw(NamedTuple):
    """One sight of a sample: the key of every random draw for it is (seed, epoch, repeat, sample.key, purpose)."""

    sample: Sample
    epoch: int
    repeat: int


@dataclass
class Batch:
    """Samples of one bucket. Either `pixels` or `moments` is there, and `condition` if the text is cached."""

    samples: list[Draw]
    pixels: Tensor | None
    """float32 [B, 3, H, W] in [-1, 1]."""
    moments: tuple[Tensor, Tensor] | None
    """(mean, std) of the latents, each [B, C, h, w]."""
    captions: list[str]
    condition: dict[str, Tensor] | None
    """The states of the text encoders: name → [B, …]."""
    loss_weights: Tensor
    """float32 [B]."""
    original_sizes: list[Size]
    crops: list[tuple[int, int]]
    """(left, top) of the crop within the resized image."""
    target_size: Size
    masks: Tensor | None = None
    """float32 [B, 1, h, w] in 0 … 1, of the latents' size or the pixels': how much each place counts in the loss."""


class TrainingData:
    """The training data. Its only state is its caches: a batch is a function of (seed, epoch, planned batch).

    `batches_per_step`: the batches of one optimizer step, of all processes; `total_steps`: the steps of the run. Token
    warm-up depends on these.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        seed: int,
        prior_loss_weight: float = 1.0,
        batches_per_step: int = 1,
        total_steps: int = 0,
    ) -> None:
        self.samples = prepared.samples
        self.placements = prepared.placements
        self.groups = prepared.groups
        self.mixes = prepared.mixes
        self.summaries = prepared.summaries
        self.seed = seed
        self.prior_loss_weight = prior_loss_weight
        self.batches_per_step = batches_per_step
        self.total_steps = total_steps
        self.latents: LatentCache | DiskLatents | None = None
        self.masks: MaskCache | None = None
        self.texts: TextCache | DiskTexts | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Of all processes together."""
        return sum(group.batches for group in self.groups)

    def plan(self, epoch: int) -> list[PlannedBatch]:
        """The batches of this epoch, for all processes."""
        by_shares = [batch for mix in self.mixes for batch in mix.epoch(seed=self.seed, epoch=epoch)]
        return epoch_batches(self.groups, seed=self.seed, epoch=epoch, by_shares=by_shares)

    def captions(self) -> list[str]:
        """The distinct texts that draws start from: see `captions.as_written`."""
        return list(self.caption_folders())

    def caption_folders(self) -> dict[str, Path]:
        """The same, each with the folder of the first image that has it."""
        folders: dict[str, Path] = {}
        for sample in self.samples:
            for text in as_written(sample.caption, sample.subset):
                folders.setdefault(text, sample.path.parent)
        return folders

    def example(self, subset: SubsetSpec) -> str | None:
        """The text of the first sight of an image of this subset, in the order of training."""
        for (index, repeat), step in self._steps(epoch=0).items():
            if self.samples[index].subset == subset:
                return self._caption(Draw(self.samples[index], 0, repeat), step)
        return None

    def cached_views(self) -> list[View]:
        """Every view of the images: with `flip_aug` also the mirrored ones."""
        return [
            fixed_view(sample, placement, flip=flip)
            for sample, placement in zip(self.samples, self.placements, strict=True)
            for flip in ((False, True) if sample.subset.flip_aug else (False,))
        ]

    def cache_latents(
        self,
        encode: Callable[[Tensor], tuple[Tensor, Tensor]],
        *,
        batch_size: int,
        disk: Disk | None = None,
        beside: Sequence[TrainingData] = (),
    ) -> None:
        """See `cache.encode_images`, or with `disk` `disk_cache.cache_images`. `beside`: other data of the same run."""
        views = self.cached_views()
        latents: LatentCache | DiskLatents
        if disk is None:
            latents = encode_images(views, encode, batch_size=batch_size)
        else:
            others = [view for other in beside for view in other.cached_views()]
            latents = cache_images(views, encode, batch_size=batch_size, disk=disk, used_too=others)
        self.latents = latents

        def size(view: View) -> tuple[int, int]:
            *_, height, width = latents.get([view])[0].shape
            return height, width

        self.masks = cache_masks(views, size)

    def cache_captions(
        self,
        encode: Callable[[list[str]], dict[str, Tensor]],
        *,
        batch_size: int,
        disk: Disk | None = None,
        beside: Sequence[TrainingData] = (),
    ) -> None:
        """See `cache.encode_captions`, or with `disk` `disk_cache.cache_captions`. `beside`: other data of the run.

        Call `captions.refuse_text_cache_of_changing_captions` before.
        """
        assert all(is_static(sample.subset) for sample in self.samples)
        if disk is None:
            self.texts = encode_captions(self.captions(), encode, batch_size=batch_size)
        else:
            others = {text: folder for other in beside for text, folder in other.caption_folders().items()}
            self.texts = cache_captions(
                self.caption_folders(), encode, batch_size=batch_size, disk=disk, used_too=others
            )

    def loader(self, *, workers: int, world_size: int = 1, persistent: bool = False, pin: bool = False) -> PixelLoader:
        """A loader with as many worker processes as there is work for: none where the latents are cached."""
        most_batches = 0 if self.latents is not None else -(-self.batches_per_epoch // world_size)
        return PixelLoader(workers=workers, most_batches=most_batches, persistent=persistent, pin=pin)

    def batches(self, plan: Sequence[PlannedBatch], *, epoch: int, loader: PixelLoader) -> Iterator[Batch]:
        """The planned batches of this process, in order: a whole epoch's share or the rest of one."""
        views: Iterator[list[View]] = (self.views(planned, epoch) for planned in plan)
        steps = self._steps(epoch)
        if self.latents is not None:
            assert self.masks is not None
            for planned, seen in zip(plan, views, strict=True):
                moments, masks, step = self.latents.get(seen), self.masks.get(seen), steps[planned[0]]
                yield self._batch(planned, epoch, seen, step=step, pixels=None, moments=moments, masks=masks)
        else:
            views, to_load = tee(views)
            for planned, seen, (pixels, masks) in zip(plan, views, loader(to_load), strict=True):
                step = steps[planned[0]]
                yield self._batch(planned, epoch, seen, step=step, pixels=pixels, moments=None, masks=masks)

    def _steps(self, epoch: int) -> Mapping[tuple[int, int], int]:
        """(sample, repeat) → the optimizer's steps done before its batch of this epoch, by its place in the plan.

        So it depends neither on a process's share of the epoch nor on where a run was resumed.
        """
        before = epoch * -(-self.batches_per_epoch // self.batches_per_step)  # an epoch ends with a step
        return {
            draw: before + i // self.batches_per_step for i, planned in enumerate(self.plan(epoch)) for draw in planned
        }

    def views(self, planned: PlannedBatch, epoch: int) -> list[View]:
        """The view of each image of a batch."""
        return [
            drawn_view(self.samples[index], self.placements[index], seed=self.seed, epoch=epoch, repeat=repeat)
            for index, repeat in planned
        ]

    def _caption(self, draw: Draw, step: int) -> str:
        sample, epoch, repeat = draw
        draws = partial(python_random, self.seed, epoch, repeat, sample.key)
        return caption_text(sample.caption, sample.subset, Sight(draws, epoch, step, self.total_steps))

    def _weight(self, subset: SubsetSpec) -> float:
        """The weight of a sample's loss. Outside of masks the prior's weight is for that part alone."""
        weight = self.prior_loss_weight if subset.is_reg else 1.0
        return weight * subset.prior_weight if subset.prior and subset.prior_region == "all" else weight

    def _batch(
        self,
        planned: PlannedBatch,
        epoch: int,
        views: Sequence[View],
        *,
        step: int,
        pixels: Tensor | None,
        moments: tuple[Tensor, Tensor] | None,
        masks: Tensor | None,
    ) -> Batch:
        draws = [Draw(self.samples[index], epoch, repeat) for index, repeat in planned]
        captions = [self._caption(draw, step) for draw in draws]
        weights = [self._weight(draw.sample.subset) for draw in draws]
        return Batch(
            samples=draws,
            pixels=pixels,
            moments=moments,
            captions=captions,
            condition=None if self.texts is None else self.texts.get(captions),
            loss_weights=torch.tensor(weights),
            original_sizes=[draw.sample.size for draw in draws],
            crops=[view.offset for view in views],
            target_size=views[0].size,
            masks=masks,
        )
