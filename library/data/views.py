"""The view of an image in one draw: its size, cut, mirroring and colours. Everything that varies is keyed."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.buckets import Placement
from library.data.color import Jitter, draw_jitter
from library.data.crops import face_crop, random_crop
from library.data.samples import Sample, Size
from library.errors import UserError
from library.rng import python_random

if TYPE_CHECKING:
    from library.config.data.dataset_config import DatasetSpec


@dataclass(frozen=True)
class View:
    """An image as the network sees it: resized, cut to `size` at `crop` (left, top), recoloured, perhaps mirrored."""

    path: Path
    resized: Size
    crop: tuple[int, int]
    size: Size
    flip: bool
    interpolation: str | None = None
    """The filter of the resizing: see `resize.resize`."""
    alpha_mask: bool = False
    """The alpha channel weighs the loss, and the colours are those stored beneath it."""
    mask: Path | None = None
    """An image of the same size, of which the red channel weighs the loss."""
    jitter: Jitter | None = None

    @property
    def offset(self) -> tuple[int, int]:
        """(left, top) of the crop in the resized image; with `flip`, in the mirrored one."""
        left, top = self.crop
        return (self.resized[0] - self.size[0] - left if self.flip else left), top

    @property
    def masked(self) -> bool:
        """Whether a mask weighs the loss."""
        return self.alpha_mask or self.mask is not None


def fixed_view(sample: Sample, placement: Placement, *, flip: bool) -> View:
    """The view of an image that looks the same each time, but for its mirroring."""
    subset = sample.subset
    return View(
        path=sample.path,
        resized=placement.resized,
        crop=placement.crop,
        size=placement.bucket,
        flip=flip,
        interpolation=subset.resize_interpolation,
        alpha_mask=subset.alpha_mask,
        mask=sample.mask,
    )


def drawn_view(sample: Sample, placement: Placement, *, seed: int, epoch: int, repeat: int) -> View:
    """The view at one draw; each varying property has a key of its own."""

    def rng(purpose: str) -> random.Random:
        return python_random(seed, epoch, repeat, sample.key, purpose)

    subset = sample.subset
    view = fixed_view(sample, placement, flip=subset.flip_aug and rng("flip").random() < 0.5)
    if subset.color_aug:
        view = replace(view, jitter=draw_jitter(rng("color")))
    if sample.face is not None and subset.face_crop_aug_range is not None:
        resized, crop = face_crop(
            sample.face,
            image=sample.size,
            size=view.size,
            among=subset.face_crop_aug_range,
            anywhere=subset.random_crop,
            rng=rng("crop"),
        )
        return replace(view, resized=resized, crop=crop)
    if subset.random_crop:
        return replace(view, crop=random_crop(view.resized, view.size, rng("crop")))
    return view


def refuse_latent_cache_of_changing_images(datasets: Iterable[DatasetSpec], *, option: str = "cache_latents") -> None:
    """Raises UserError if latents cannot be cached, because the image changes from one sight to the next."""
    for dataset in datasets:
        for subset in dataset.subsets:
            varying = {
                "random_crop": subset.random_crop,
                "color_aug": subset.color_aug,
                # buckets decide the crop: see `prepare`
                "face_crop_aug_range": subset.face_crop_aug_range is not None and not dataset.enable_bucket,
            }
            for name, varies in varying.items():
                if varies:
                    raise UserError(
                        f"{option} and {name} exclude each other: the image would change each time it is seen "
                        f"({subset.origin}, {subset.image_dir}). Leave one of them out"
                    )
