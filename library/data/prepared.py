"""`Prepared`: the images of a run, each in its bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.buckets import Buckets, Placement
from library.data.mix import Mix, Shares, mix
from library.data.plan import Group
from library.data.quality.folder import Folder
from library.data.samples import Sample, Size, SubsetSummary
from library.errors import UserError

if TYPE_CHECKING:
    from library.config.data.dataset_config import DatasetSpec

MOST_DRAWS = 20_000_000  # in an epoch


@dataclass(frozen=True)
class Prepared:
    """`placements[i]` belongs to `samples[i]`; the groups hold indices into both. `mixes`: of the data sets that are
    drawn by shares. `validation`: the images held out. `trained`: some of the trained images, prepared as those held
    out are, to compare the two.

    `contents`: the first file of each content, those held out included; empty where nothing is measured.
    """

    samples: list[Sample]
    placements: list[Placement]
    groups: list[Group]
    summaries: list[SubsetSummary]
    mixes: tuple[Mix, ...] = ()
    validation: Prepared | None = None
    trained: Prepared | None = None
    contents: Mapping[str, Path] = field(default_factory=dict)
    folders: tuple[Folder, ...] = ()
    """All usable images as the data check sees them, before any are held out or balanced."""

    @property
    def train_images(self) -> int:
        """Different images, without repeats, other resolutions of them, and regularisation images."""
        return len({sample.path for sample in self.samples if not sample.subset.is_reg})

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches of an epoch over all processes."""
        return sum(group.batches for group in self.groups)


def placed(
    datasets: Sequence[DatasetSpec],
    buckets: Sequence[Buckets],
    samples: Sequence[list[Sample]],
    shares: Sequence[Shares | None] = (),
) -> Prepared:
    """The samples of each data set in their buckets. `shares`: of each data set; none: all are drawn by repeats."""
    together: list[Sample] = []
    placements: list[Placement] = []
    groups: list[Group] = []
    mixes: list[Mix] = []
    for number, (spec, own, share) in enumerate(zip_longest(datasets, samples, shares)):
        placed, first = _place(own, buckets[number]), len(together)
        if share is None:
            groups += _group(number, spec.batch_size, own, placed, first=first)
        else:
            mixes.append(mix(number, spec.batch_size, own, placed, share, first=first))
            groups += mixes[-1].groups()
        together += own
        placements += placed
    _refuse_endless_epoch(together)
    return Prepared(together, placements, groups, [], tuple(mixes))


def _place(samples: Sequence[Sample], buckets: Buckets) -> list[Placement]:
    placed: list[Placement] = []
    too_small: list[str] = []
    for sample in samples:
        try:
            placed.append(buckets.place(sample.size, keep_size=sample.subset.random_crop))
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


def _refuse_endless_epoch(samples: Sequence[Sample]) -> None:
    """Each draw of an epoch is an entry in a list: a typing mistake in the repeats would fill the memory."""
    draws = sum(sample.repeats for sample in samples)
    if draws > MOST_DRAWS:
        most = max(samples, key=lambda sample: sample.repeats)
        raise UserError(
            f"{most.subset.origin}: {most.repeats} repeats of each image in {most.subset.source}: an epoch would have "
            f"{draws} images, and {MOST_DRAWS} are the most"
        )
