"""Chooses the images that are held out for validation. Images are told apart by content: copies stay on one side."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.samples import Sample
from library.errors import UserError
from library.rng import key_of

if TYPE_CHECKING:
    from library.config.data.dataset_config import SubsetSpec

logger = logging.getLogger(__name__)


def plain(subset: SubsetSpec) -> SubsetSpec:
    """The subset without the options that change an image or a caption from one sight to the next.

    Wildcards stay, because a caption must not contain their braces: they are drawn once, keyed by the image's content.
    """
    return replace(
        subset,
        num_repeats=1,
        share=None,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0.0,
        flip_aug=False,
        color_aug=False,
        random_crop=False,
        face_crop_aug_range=None,
        prior="",
        prior_region="all",
        prior_weight=1.0,
        validation_split=0.0,
        validation_seed=None,
        validation_dir=None,
    )


def beside(subset: SubsetSpec) -> SubsetSpec | None:
    """The subset of its `validation_dir`: captions and pictures are read as its own are, without masks."""
    if subset.validation_dir is None:
        return None
    return replace(
        plain(subset),
        image_dir=Path(subset.validation_dir),
        conditioning_data_dir=None,
        origin=f"{subset.origin}: validation_dir",
    )


Fold = tuple[int, int]
"""Which part is held out, from 1, and of how many."""


def held_out(
    samples: Iterable[Sample], contents: Mapping[Path, str], *, seed: int, fold: Fold | None = None
) -> set[str]:
    """The contents that are held out from each subset with a `validation_split`: that share of its different images, or
    with a `fold` that part of them; each image is in one part.

    The choice depends on the seed and the contents alone, not on names, order or repeats. `contents`: by file.
    Raises UserError if the shares are less than one image.
    """
    by_subset: dict[SubsetSpec, set[str]] = {}
    for sample in samples:
        if sample.subset.learns and sample.subset.validation_split:
            by_subset.setdefault(sample.subset, set()).add(contents[sample.path])
    chosen: set[str] = set()
    too_small: list[str] = []
    for subset, distinct in by_subset.items():
        own_seed = seed if subset.validation_seed is None else subset.validation_seed
        ordered = sorted(distinct, key=lambda content: key_of(own_seed, content, "held out"))
        if fold is not None:
            part, parts = fold
            if len(ordered) < parts:
                raise UserError(f"{subset.source}: {parts} parts of {len(ordered)} different images: at most as many")
            chosen |= set(ordered[part - 1 :: parts])
            continue
        count = int(len(distinct) * subset.validation_split + 0.5)
        if count == 0:
            least = f"{0.5 / len(distinct) + 0.0005:.3f}"
            too_small.append(
                f"{subset.source}: validation_split {subset.validation_split:g} of {len(distinct)} different images is "
                f"none: at least {least}"
            )
        chosen |= set(ordered[:count])
    if too_small and not chosen:
        raise UserError("\n".join(too_small))
    for line in too_small:
        logger.warning("%s", line)
    return chosen


def split(
    samples: Sequence[Sample], apart: Sequence[Sample], contents: Mapping[Path, str], chosen: set[str]
) -> tuple[list[Sample], list[Sample]]:
    """(to train, to validate) of one data set. `apart`: those of folders for validation; `chosen`: see `held_out`.

    No image is in both, whatever subset it comes from. Each validation image is seen once, in the order of contents.
    Its content is also its key, so its random draws do not depend on its path.
    """
    train = [sample for sample in samples if contents[sample.path] not in chosen]
    candidates = [
        *apart,
        *(
            sample
            for sample in samples
            if contents[sample.path] in chosen and sample.subset.learns and sample.subset.validation_split
        ),
    ]
    distinct: dict[tuple[str, str], Sample] = {}
    for sample in candidates:
        content = contents[sample.path]
        one = replace(sample, key=content, subset=plain(sample.subset), repeats=1, face=None)
        distinct.setdefault((content, sample.caption), one)
    return train, [distinct[key] for key in sorted(distinct)]


def tell(
    found: Sequence[Sample], train: Sequence[Sample], validation: Sequence[Sample], *, grouped: bool = False
) -> None:
    """Log how many images are held out, and how many copies of them are therefore not trained. `grouped`: whole groups
    are held out (`validation_groups`)."""
    logger.info("%d images are held out for validation; %d are left to train", len(validation), len(train))
    gone = Counter(sample.subset for sample in found) - Counter(sample.subset for sample in train)
    for subset, count in gone.items():
        if not (subset.learns and subset.validation_split):
            logger.warning(
                "%s: %d images are not trained: they are %s images held out for validation",
                *(subset.source, count, "in a group with" if grouped else "copies of"),
            )
