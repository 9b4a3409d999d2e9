"""Named folders of images that are measured during training, beside those held out of the trained folders:
`--validation_dir` and `--forgetting_dir`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.dataset_config import DatasetSpec
from library.config.image_folders import NamedFolder, named_folders, refuse_twins
from library.config.options import Options
from library.errors import UserError

if TYPE_CHECKING:
    from library.data.prepare import Prepared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuredFolder(NamedFolder):
    """`dataset`: its images as a data set. `is_unrelated`: of --forgetting_dir."""

    dataset: DatasetSpec
    is_unrelated: bool


def measured_folders(options: Options, datasets: Sequence[DatasetSpec]) -> list[MeasuredFolder]:
    """The folders of both options, --validation_dir first. Raises UserError for one that does not exist, and for two of
    one name."""
    found = [
        MeasuredFolder(one.name, one.path, one.place, _dataset(one, options, datasets[0], unrelated), unrelated)
        for name, unrelated in (("validation_dir", False), ("forgetting_dir", True))
        for one in named_folders(getattr(options.validation, name), option=name)
    ]
    refuse_twins(found)
    return found


def validation_folders(folders: Sequence[MeasuredFolder]) -> Iterator[MeasuredFolder]:
    """Those of --validation_dir."""
    return (one for one in folders if not one.is_unrelated)


def _dataset(folder: NamedFolder, options: Options, like: DatasetSpec, unrelated: bool) -> DatasetSpec:
    """Captions and sizes are read as those of the first data set's first subset. Captions of unrelated images get no
    words that belong to what is trained."""
    first = like.subsets[0]
    ending = first.caption_extension if first.metadata_file is None else options.data.caption_extension
    if unrelated:
        first = replace(first, caption_prefix=None, caption_suffix=None, class_tokens=None)
    subset = replace(
        first,
        image_dir=folder.path,
        metadata_file=None,
        is_reg=False,
        caption_extension=ending,
        alpha_mask=False,
        conditioning_data_dir=None,
        origin=folder.place,
    )
    return replace(like, skip_image_resolution=None, subsets=(subset,))


@dataclass(frozen=True)
class MeasuredSet:
    """The images of a folder, each different one once. `is_unrelated`: to what is trained."""

    name: str
    prepared: Prepared
    is_unrelated: bool


def measured_sets(
    folders: Sequence[MeasuredFolder], trained: Mapping[str, Path], *, multiple_of: int, skip_bad_images: bool
) -> list[MeasuredSet]:
    """The folders' images. `trained`: `Prepared.contents` of the training data. Raises UserError as `prepare` does, and
    for images that are in the training data, too."""
    from library.data.prepare import prepare_to_measure  # imports torch

    found = []
    for one in folders:
        prepared = prepare_to_measure(one.dataset, multiple_of=multiple_of, skip_bad_images=skip_bad_images)
        both = [sample for sample in prepared.samples if sample.key in trained]
        if both:
            why = "Forgetting is measured on other images" if one.is_unrelated else "Validation needs other images"
            raise UserError(
                f"{one.place}: {len(both)} of its {len(prepared.samples)} images are in the training data as well "
                f"({both[0].path.name} is {trained[both[0].key]}). {why}: leave these out of one of the two"
            )
        where = one.path, one.name
        measured = "forgetting" if one.is_unrelated else "validation loss"
        logger.info("the %s is measured on %d images of %s, named %s", measured, len(prepared.samples), *where)
        found.append(MeasuredSet(one.name, prepared, one.is_unrelated))
    return found
