"""Named folders of images that are measured, beside those held out of the trained folders: those of `--validation_dir`,
`--forgetting_dir` and `--ewc_dir`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.config.dataset_config import DatasetSpec
from library.config.image_folders import NamedFolder, named_folders, refuse_twins
from library.config.options import Options
from library.errors import UserError

if TYPE_CHECKING:
    from library.data.prepare import Prepared

logger = logging.getLogger(__name__)


Use = Literal["validation", "forgetting", "ewc"]


@dataclass(frozen=True)
class MeasuredFolder(NamedFolder):
    """`dataset`: its images as a data set."""

    dataset: DatasetSpec
    use: Use


def measured_folders(options: Options, datasets: Sequence[DatasetSpec]) -> list[MeasuredFolder]:
    """The folders of these options, --validation_dir first. Raises UserError for one that does not exist, and for two
    of one name in the reports."""
    given: dict[Use, tuple[str, ...]] = {
        "validation": options.validation.validation_dir,
        "forgetting": options.validation.forgetting_dir,
        "ewc": options.forgetting.ewc_dir,
    }
    found = [
        MeasuredFolder(one.name, one.path, one.place, dataset_like(datasets[0], one, options, use), use)
        for use, words in given.items()
        for one in named_folders(words, option=f"{use}_dir")
    ]
    refuse_twins(one for one in found if one.use != "ewc")
    return found


def validation_folders(folders: Sequence[MeasuredFolder]) -> Iterator[MeasuredFolder]:
    """Those of --validation_dir."""
    return (one for one in folders if one.use == "validation")


def dataset_like(like: DatasetSpec, folder: NamedFolder, options: Options, use: Use) -> DatasetSpec:
    """A folder as a data set: captions and sizes are read as those of the first subset of `like`. Only captions to
    validate on get the words that belong to what is trained. The images for EWC come one at a time."""
    first = like.subsets[0]
    ending = first.caption_extension if first.metadata_file is None else options.data.caption_extension
    if use != "validation":
        first = replace(first, caption_prefix=None, caption_suffix=None, class_tokens=None)
    subset = replace(
        first,
        image_dir=folder.path,
        metadata_file=None,
        is_reg=False,
        caption_extension=ending,
        prior="",
        alpha_mask=False,
        conditioning_data_dir=None,
        origin=folder.place,
    )
    batch_size = 1 if use == "ewc" else like.batch_size
    return replace(like, batch_size=batch_size, skip_image_resolution=None, subsets=(subset,))


@dataclass(frozen=True)
class MeasuredSet:
    """The images of a folder, each different one once."""

    name: str
    prepared: Prepared
    use: Use


def measured_sets(
    folders: Sequence[MeasuredFolder], trained: Mapping[str, Path], *, multiple_of: int, skip_bad_images: bool
) -> list[MeasuredSet]:
    """The folders' images. `trained`: `Prepared.contents` of the training data. Raises UserError as `prepare` does, and
    for images of --validation_dir and --forgetting_dir that are in the training data, too."""
    from library.data.prepare import prepare_to_measure  # imports torch

    found = []
    for one in folders:
        prepared = prepare_to_measure(one.dataset, multiple_of=multiple_of, skip_bad_images=skip_bad_images)
        both = [sample for sample in prepared.samples if sample.key in trained]
        if both and one.use != "ewc":
            why = f"{one.use.capitalize()} is measured on other images"
            raise UserError(
                f"{one.place}: {len(both)} of its {len(prepared.samples)} images are in the training data as well "
                f"({both[0].path.name} is {trained[both[0].key]}). {why}: leave these out of one of the two"
            )
        logger.info("%s: %d images of %s, named %s", one.use, len(prepared.samples), one.path, one.name)
        found.append(MeasuredSet(one.name, prepared, one.use))
    return found
