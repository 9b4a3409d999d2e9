"""From the specs of the data sets to measured, balanced samples, each in its bucket."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

from library.data.buckets import Buckets, Placement
from library.data.check import check_images, report_bad_images
from library.data.plan import Group
from library.data.samples import Sample, Size, SubsetSummary
from library.data.sources import dreambooth
from library.errors import UserError

if TYPE_CHECKING:
    from library.config.dataset_config import DatasetSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """`placements[i]` belongs to `samples[i]`; the groups hold indices into both."""

    samples: list[Sample]
    placements: list[Placement]
    groups: list[Group]
    summaries: list[SubsetSummary]

    @property
    def train_images(self) -> int:
        """Different images, without repeats and without regularisation images."""
        return sum(summary.images for summary in self.summaries if not summary.subset.is_reg)

    @property
    def batches_per_epoch(self) -> int:
        """Of all processes together."""
        return sum(group.batches for group in self.groups)


def prepare(datasets: Sequence[DatasetSpec], *, multiple_of: int, skip_bad_images: bool = False) -> Prepared:
    """Find all images and captions, decode every image once, and place each in a bucket.

    `multiple_of`: what widths and heights must be a multiple of, in pixels (the VAE's factor, times what the UNet
    asks for). Raises UserError for whatever is wrong with the options, the folders or the files; what can be told
    fast is told first.
    """
    buckets = [Buckets(spec, multiple_of=multiple_of) for spec in datasets]
    index = count()  # of a subset over all data sets: part of its samples' keys
    scans = [[dreambooth.scan(subset, next(index)) for subset in spec.subsets] for spec in datasets]
    sizes, bad = check_images(sample.path for of_dataset in scans for scan in of_dataset for sample in scan.samples)
    report_bad_images(bad, skip=skip_bad_images)

    samples: list[Sample] = []
    placements: list[Placement] = []
    groups: list[Group] = []
    summaries: list[SubsetSummary] = []
    for number, (spec, of_dataset) in enumerate(zip(datasets, scans, strict=True)):
        found = [sample for scan in of_dataset for sample in scan.samples]
        readable = [replace(sample, size=sizes[sample.path]) for sample in found if sample.path in sizes]
        balanced = dreambooth.balance_regularisation(readable)
        if not balanced:
            raise UserError(f"{_origins(spec)}: no images to train, or only regularisation images")
        placed = _place(balanced, buckets[number])
        groups += _group(number, spec.batch_size, balanced, placed, first=len(samples))
        summaries += _counted(of_dataset, readable, balanced)
        samples += balanced
        placements += placed
    return Prepared(samples, placements, groups, summaries)


def _place(samples: Sequence[Sample], buckets: Buckets) -> list[Placement]:
    placed: list[Placement] = []
    too_small: list[str] = []
    for sample in samples:
        try:
            placed.append(buckets.place(sample.size))
        except ValueError as error:
            too_small.append(f"{sample.path}: {error}")
    if too_small:
        raise UserError(
            f"{len(too_small)} images are too small or too narrow for bucket_no_upscale ({too_small[0]}): "
            "leave them or that option out, or give a smaller bucket_reso_steps"
        )
    return placed


def _group(
    dataset: int, batch_size: int, samples: Sequence[Sample], placements: Sequence[Placement], *, first: int
) -> list[Group]:
    """One group a bucket, sorted by size; the index of the first sample is `first`."""
    members: dict[Size, list[tuple[int, int]]] = {}
    for i, (sample, placement) in enumerate(zip(samples, placements, strict=True), start=first):
        members.setdefault(placement.bucket, []).append((i, sample.repeats))
    return [Group(dataset, size, batch_size, tuple(members[size])) for size in sorted(members)]


def _counted(
    scans: Sequence[dreambooth.Scan], readable: Sequence[Sample], used: Sequence[Sample]
) -> Iterator[SubsetSummary]:
    """The summaries of a data set with what became of the images of each subset."""
    are_readable = Counter(sample.subset for sample in readable)
    are_used = Counter(sample.subset for sample in used)
    for found, summary in scans:
        subset = summary.subset
        unused = are_readable[subset] - are_used[subset]
        if unused:
            logger.warning("%s: %d regularisation images are more than needed", subset.image_dir, unused)
        bad = len(found) - are_readable[subset]
        yield replace(summary, images=are_used[subset], bad_images=bad, unused_reg_images=unused)


def _origins(spec: DatasetSpec) -> str:
    return ", ".join(dict.fromkeys(subset.origin for subset in spec.subsets)) or "data set without subsets"
