"""Samples, buckets and caches → batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from library.data.cache import LatentCache, TextCache, encode_captions, encode_images
from library.data.captions import caption_text, is_static
from library.data.disk_cache import Disk, DiskLatents, DiskTexts, cache_captions, cache_images
from library.data.images import View
from library.data.loader import PixelLoader
from library.data.plan import PlannedBatch, epoch_batches
from library.data.prepare import Prepared
from library.data.samples import Sample, Size
from library.rng import python_random


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
    """What the text encoders gave: name → [B, …]."""
    loss_weights: Tensor
    """float32 [B]."""
    original_sizes: list[Size]
    crops: list[tuple[int, int]]
    """(left, top) of what is seen within the resized image."""
    target_size: Size


class TrainingData:
    """All that is trained. It has no state but its caches: a batch is a function of (seed, epoch, planned batch)."""

    def __init__(self, prepared: Prepared, *, seed: int, prior_loss_weight: float = 1.0) -> None:
        self.samples = prepared.samples
        self.placements = prepared.placements
        self.groups = prepared.groups
        self.summaries = prepared.summaries
        self.seed = seed
        self.prior_loss_weight = prior_loss_weight
        self.latents: LatentCache | DiskLatents | None = None
        self.texts: TextCache | DiskTexts | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Of all processes together."""
        return sum(group.batches for group in self.groups)

    def plan(self, epoch: int) -> list[PlannedBatch]:
        """The batches of this epoch, for all processes."""
        return epoch_batches(self.groups, seed=self.seed, epoch=epoch)

    def captions(self) -> list[str]:
        """The distinct texts, unshuffled."""
        return list(self.caption_folders())

    def caption_folders(self) -> dict[str, Path]:
        """The distinct texts, unshuffled, each with the folder of the first image that has it."""
        folders: dict[str, Path] = {}
        for sample in self.samples:
            folders.setdefault(caption_text(sample.caption, sample.subset, None), sample.path.parent)
        return folders

    def cached_views(self) -> list[View]:
        """Every way in which an image is seen: where `flip_aug` is set, both ways round."""
        return [
            self._view(index, flip=flip)
            for index, sample in enumerate(self.samples)
            for flip in ((False, True) if sample.subset.flip_aug else (False,))
        ]

    def cache_latents(
        self, encode: Callable[[Tensor], tuple[Tensor, Tensor]], *, batch_size: int, disk: Disk | None = None
    ) -> None:
        """See `cache.encode_images`, or with `disk` `disk_cache.cache_images`."""
        if disk is None:
            self.latents = encode_images(self.cached_views(), encode, batch_size=batch_size)
        else:
            self.latents = cache_images(self.cached_views(), encode, batch_size=batch_size, disk=disk)

    def cache_captions(
        self, encode: Callable[[list[str]], dict[str, Tensor]], *, batch_size: int, disk: Disk | None = None
    ) -> None:
        """See `cache.encode_captions`, or with `disk` `disk_cache.cache_captions`.

        Call `captions.refuse_text_cache_of_changing_captions` before.
        """
        assert all(is_static(sample.subset) for sample in self.samples)
        if disk is None:
            self.texts = encode_captions(self.captions(), encode, batch_size=batch_size)
        else:
            self.texts = cache_captions(self.caption_folders(), encode, batch_size=batch_size, disk=disk)

    def loader(self, *, workers: int, world_size: int = 1, persistent: bool = False) -> PixelLoader:
        """A loader with as many worker processes as there is work for: none where the latents are cached."""
        most_batches = 0 if self.latents is not None else -(-self.batches_per_epoch // world_size)
        return PixelLoader(workers=workers, most_batches=most_batches, persistent=persistent)

    def batches(self, plan: Sequence[PlannedBatch], *, epoch: int, loader: PixelLoader) -> Iterator[Batch]:
        """The planned batches that this process is to train, in order: a whole epoch's share or the rest of one."""
        views: Iterator[list[View]] = (self._views(planned, epoch) for planned in plan)
        if self.latents is not None:
            for planned, seen in zip(plan, views, strict=True):
                yield self._batch(planned, epoch, seen, pixels=None, moments=self.latents.get(seen))
        else:
            views, to_load = tee(views)
            for planned, seen, pixels in zip(plan, views, loader(to_load), strict=True):
                yield self._batch(planned, epoch, seen, pixels=pixels, moments=None)

    def _view(self, index: int, *, flip: bool) -> View:
        placement = self.placements[index]
        return View(self.samples[index].path, placement.resized, placement.crop, placement.bucket, flip)

    def _views(self, planned: PlannedBatch, epoch: int) -> list[View]:
        return [self._view(index, flip=self._flip(self.samples[index], epoch, repeat)) for index, repeat in planned]

    def _flip(self, sample: Sample, epoch: int, repeat: int) -> bool:
        return sample.subset.flip_aug and python_random(self.seed, epoch, repeat, sample.key, "flip").random() < 0.5

    def _caption(self, sample: Sample, epoch: int, repeat: int) -> str:
        return caption_text(
            sample.caption, sample.subset, python_random(self.seed, epoch, repeat, sample.key, "caption")
        )

    def _batch(
        self,
        planned: PlannedBatch,
        epoch: int,
        views: Sequence[View],
        *,
        pixels: Tensor | None,
        moments: tuple[Tensor, Tensor] | None,
    ) -> Batch:
        draws = [Draw(self.samples[index], epoch, repeat) for index, repeat in planned]
        captions = [self._caption(*draw) for draw in draws]
        weights = [self.prior_loss_weight if draw.sample.subset.is_reg else 1.0 for draw in draws]
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
        )
