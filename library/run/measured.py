"""Named folders of images that are measured, beside those held out of the trained folders: those of `--validation_dir`,
`--forgetting_dir` and `--ewc_data`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.config.data.dataset_config import DatasetSpec, datasets_of_file
from library.config.data.image_folders import NamedFolder, named_folders, refuse_twins
from library.config.options import Options
from library.errors import UserError, nearest_path

if TYPE_CHECKING:
    from library.data.prepared import Prepared

logger = logging.getLogger(__name__)


Use = Literal["validation", "forgetting", "ewc"]
_DATA_FILES = (".toml", ".json")


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
    }
    found = [
        MeasuredFolder(one.name, one.path, one.place, dataset_like(datasets[0], one, options, use), use)
        for use, words in given.items()
        for one in named_folders(words, option=f"{use}_dir")
    ]
    refuse_twins(found)
    earlier = list(_earlier(options, datasets[0]))
    refuse_twins(earlier)
    _tell_of_sizes(options, datasets)
    return [*found, *earlier]


def _tell_of_sizes(options: Options, datasets: Sequence[DatasetSpec]) -> None:
    """Log the size of the images that are measured where training has several."""
    first, *others = dict.fromkeys(dataset.resolution for dataset in datasets)
    given = [*options.validation.validation_dir, *options.validation.forgetting_dir, *options.forgetting.ewc_data]
    if others and any(Path(word.rpartition("=")[2]).suffix.lower() not in _DATA_FILES for word in given):
        logger.info(
            "folders to measure are read at %d × %d, the size of the first data set, and not at %s as well",
            *(*first, ", ".join("{} × {}".format(*size) for size in others)),
        )


def _earlier(options: Options, like: DatasetSpec) -> Iterator[MeasuredFolder]:
    """The folders and data set files of --ewc_data, in batches of one image."""
    for word in options.forgetting.ewc_data:
        path = Path(word)
        if path.suffix.lower() not in _DATA_FILES:
            (one,) = named_folders([word], option="ewc_data")
            dataset = replace(dataset_like(like, one, options, "ewc"), batch_size=1)
            yield MeasuredFolder(one.name, one.path, one.place, dataset, "ewc")
            continue
        if not path.is_file():
            raise UserError(f"--ewc_data {word}: no such file{nearest_path(path)}")
        for number, dataset in enumerate(datasets_of_file(path, options), 1):
            learnt = tuple(subset for subset in dataset.subsets if subset.learns)
            place = f"--ewc_data {word}: [[datasets]] {number}"
            if not learnt:
                raise UserError(f"{place}: no subset whose images are learnt")
            yield MeasuredFolder(
                f"{path.stem} {number}", path, place, replace(dataset, batch_size=1, subsets=learnt), "ewc"
            )


def dataset_like(like: DatasetSpec, folder: NamedFolder, options: Options, use: Use) -> DatasetSpec:
    """A folder as a data set: captions and sizes are read as those of the first subset of `like`. Only captions to
    validate on get the words that belong to what is trained."""
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
    return replace(like, skip_image_resolution=None, subsets=(subset,))


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
