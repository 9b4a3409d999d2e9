"""The images of data sets: folders are scanned, and every image is decoded once and measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.check import Measured, check_images, report_bad_images
from library.data.crops import face_in_name, is_within
from library.data.held_out import beside
from library.data.samples import Sample, Scan, Size
from library.data.sources import dreambooth, metadata
from library.data.sources.masks import find_masks, refuse_other_sizes
from library.errors import UserError

if TYPE_CHECKING:
    from library.config.data.dataset_config import DatasetSpec, SubsetSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The images of all data sets, by data set. `beside`: scans of the folders for validation. `usable`: the samples
    that can be read and are large enough; `apart`: those of `beside`. `contents`: by file."""

    scans: list[list[Scan]]
    beside: list[list[Scan]]
    usable: list[list[Sample]]
    apart: list[list[Sample]]
    measured: dict[Path, Measured]

    @cached_property
    def contents(self) -> dict[Path, str]:
        return {path: one.content for path, one in self.measured.items()}


def find(
    datasets: Sequence[DatasetSpec],
    *,
    contents: bool,
    skip_bad_images: bool = False,
    faults: dict[Path, str] | None = None,
) -> Found:
    """Scan all folders and decode every image once. With `faults`, unreadable files are put there instead of raised."""
    index = count()  # numbers the subsets of all data sets: part of their samples' keys
    once: dict[SubsetSpec, Scan] = {}
    scans = [[_scan(subset, next(index), once, faults) for subset in spec.subsets] for spec in datasets]
    apart = [[_scan(own, 0, once, faults) for subset in spec.subsets if (own := beside(subset))] for spec in datasets]
    found = [sample for of_dataset in (*scans, *apart) for scan in of_dataset for sample in scan.samples]
    masks = [sample.mask for sample in found if sample.mask is not None]
    measured, bad = check_images([*(sample.path for sample in found), *masks], contents=contents)
    if faults is None:
        report_bad_images(bad, skip=skip_bad_images)
    else:
        faults |= bad
    large, large_apart = (
        [usable(of_dataset, measured, spec) for of_dataset, spec in zip(part, datasets, strict=True)]
        for part in (scans, apart)
    )
    return Found(scans, apart, large, large_apart, measured)


def usable(scans: Sequence[Scan], measured: dict[Path, Measured], spec: DatasetSpec) -> list[Sample]:
    """The samples of a data set whose images can be read and are large enough for it."""
    found: list[Sample] = []
    for scan in scans:
        readable = _with_measures(scan.samples, measured, bucketed=spec.enable_bucket)
        large = [sample for sample in readable if not _is_too_small(sample.size, spec)]
        if len(large) < len(readable):
            assert spec.skip_image_resolution is not None
            width, height = spec.skip_image_resolution
            small = next(sample for sample in readable if _is_too_small(sample.size, spec))
            logger.info(
                "%s: %d of %d images are left out, no larger than the %d × %d of skip_image_resolution (such as "
                "%s, %d × %d)",
                *(small.subset.source, len(readable) - len(large), len(readable), width, height),
                *(small.path.name, *small.size),
            )
        found += large
    return found


def _is_too_small(size: Size, spec: DatasetSpec) -> bool:
    """Whether an image's area is at most that of skip_image_resolution, as in kohya."""
    limit = spec.skip_image_resolution
    return limit is not None and size[0] * size[1] <= limit[0] * limit[1]


def _scan(subset: SubsetSpec, index: int, once: dict[SubsetSpec, Scan], faults: dict[Path, str] | None) -> Scan:
    """The samples of a subset, with keys for this index. `once`: those that have been scanned, for another size."""
    if subset in once:
        samples = [replace(sample, key=f"{index}/{sample.key.partition('/')[2]}") for sample in once[subset].samples]
        return once[subset]._replace(samples=samples)
    once[subset] = scanned(subset, index, faults)
    return once[subset]


def scanned(subset: SubsetSpec, index: int, faults: dict[Path, str] | None) -> Scan:
    scan = dreambooth.scan(subset, index, faults) if subset.metadata_file is None else metadata.scan(subset, index)
    samples = find_masks(scan.samples)
    if subset.sentences:
        samples = [replace(sample, caption="\n".join(subset.sentences)) for sample in samples]
    return scan._replace(samples=samples)


def is_readable(sample: Sample, measured: dict[Path, Measured]) -> bool:
    return sample.path in measured and (sample.mask is None or sample.mask in measured)


def _with_measures(samples: Sequence[Sample], measured: dict[Path, Measured], *, bucketed: bool) -> list[Sample]:
    """The readable samples of a subset with their sizes and, where they are used, faces."""
    readable = [replace(sample, size=measured[sample.path].size) for sample in samples if is_readable(sample, measured)]
    refuse_other_sizes(readable, {path: one.size for path, one in measured.items()})
    if not readable:
        return []
    subset = readable[0].subset
    if subset.alpha_mask and not any(measured[sample.path].transparent for sample in readable):
        logger.warning("%s: alpha_mask has no effect: no image has an alpha channel", subset.image_dir)
    if subset.face_crop_aug_range is None:
        return readable
    if bucketed:
        logger.warning("%s: face_crop_aug_range has no effect with enable_bucket, as in kohya", subset.image_dir)
        return readable
    return _with_faces(readable)


def _with_faces(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of a subset with the faces in their names. Raises UserError where there is none."""
    faces = [face_in_name(sample.path) for sample in samples]
    found = [
        replace(sample, face=face if face is not None and is_within(face, sample.size) else None)
        for sample, face in zip(samples, faces, strict=True)
    ]
    without = [sample for sample in found if sample.face is None]
    subset = samples[0].subset
    if len(without) == len(found):
        raise UserError(
            f"{subset.origin}: face_crop_aug_range: no image in {subset.image_dir} has a face in its name, such as "
            f"{samples[0].path.stem}_120_80_64_64{samples[0].path.suffix} (x and y of the centre, width, height)"
        )
    if without:
        where = subset.image_dir, len(without), without[0].path.name
        logger.warning("%s: %d images have no face in their name and are cropped without one (such as %s)", *where)
    return found
