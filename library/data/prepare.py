"""From the specs of the data sets to measured, balanced samples, each in its bucket."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.dataset_config import is_validated
from library.config.shares import draws_by_shares, shares_of
from library.data import validation_groups
from library.data.buckets import Buckets, Placement
from library.data.captions import warn_of_captions_without_tags
from library.data.check import Measured, check_images, report_bad_images
from library.data.crops import face_in_name, is_within
from library.data.held_out import Fold, beside, held_out, plain, split, tell
from library.data.masks import find_masks, refuse_other_sizes
from library.data.mix import Mix, Shares, mix
from library.data.plan import Group
from library.data.quality.folder import Folder, picture_of
from library.data.samples import Sample, Scan, Size, SubsetSummary
from library.data.sources import dreambooth, metadata
from library.errors import UserError
from library.rng import key_of

if TYPE_CHECKING:
    from library.config.dataset_config import DatasetSpec, SubsetSpec

logger = logging.getLogger(__name__)
NO_FAULTS: Mapping[Path, str] = {}
_MOST_DRAWS = 20_000_000  # in an epoch


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


def prepare(
    datasets: Sequence[DatasetSpec],
    *,
    multiple_of: int,
    skip_bad_images: bool = False,
    seed: int = 0,
    measures: bool = False,
    validation_group: str = "",
    fold: Fold | None = None,
) -> Prepared:
    """Find all images and captions, decode every image once, hold out those of validation, place each in a bucket.

    `multiple_of`: widths and heights are multiples of this many pixels, as the model's family declares it.
    `seed`: of validation, for subsets without one of their own. `measures`: other images are measured in this run, or
    trained ones beside those held out. `validation_group`: see `validation_groups`; `fold`: see `held_out`. Raises
    UserError for any mistake in the options, the folders or the files; quick checks come first.
    """
    buckets = [Buckets(spec, multiple_of=multiple_of) for spec in datasets]
    found = _find(datasets, contents=is_validated(datasets) or measures, skip_bad_images=skip_bad_images)
    scans, usable, usable_apart, measured = found.scans, found.usable, found.apart, found.measured
    contents = found.contents
    chosen = _chosen(found, seed=seed, group=validation_group, fold=fold)
    train: list[list[Sample]] = []
    validation: list[list[Sample]] = []
    summaries: list[SubsetSummary] = []
    shares: list[Shares | None] = []
    told: list[tuple[SubsetSpec, ...]] = []
    for spec, of_dataset, samples, others in zip(datasets, scans, usable, usable_apart, strict=True):
        to_train, to_validate = split(samples, others, contents, chosen)
        if all(sample.subset.is_reg for sample in to_train):
            raise UserError(f"{_origins(spec)}: no images to train{_why(spec, samples, to_train)}")
        if len(to_train) < len(samples) and spec.subsets not in told:
            tell(samples, to_train, to_validate, grouped=bool(validation_group))
            told.append(spec.subsets)  # once, however many resolutions they have
        shares.append(_shares(spec, to_train))
        drawn = to_train if shares[-1] is not None else dreambooth.balance_regularisation(to_train)
        summaries += _counted(of_dataset, measured, samples, to_train, drawn, shares[-1])
        train.append(drawn)
        validation.append(to_validate)
    warn_of_captions_without_tags(sample for own in train for sample in own)
    placed = _placed(datasets, buckets, validation) if any(validation) else None
    folders = tuple(_folders(buckets, found, chosen))
    prepared = replace(
        _placed(datasets, buckets, train, shares), summaries=summaries, validation=placed, folders=folders
    )
    if not measures:
        return prepared
    firsts: dict[str, Path] = {}
    for sample in (sample for part in usable for sample in part):
        firsts.setdefault(contents[sample.path], sample.path)
    return replace(prepared, contents=firsts)


def some_trained(prepared: Prepared, datasets: Sequence[DatasetSpec], *, multiple_of: int, most: int) -> Prepared:
    """`most` of the images that are learnt, as validation would have them; all, if there are no more. The choice
    depends on their contents alone. `prepared`: of `prepare` with `measures`."""
    contents = {path: content for content, path in prepared.contents.items()}  # of each different image
    by_dataset: list[list[Sample]] = [[] for _ in datasets]
    for group in prepared.groups:
        by_dataset[group.dataset] += [prepared.samples[index] for index, _ in group.members]
    learnt = [[one for one in own if one.subset.learns and one.path in contents] for own in by_dataset]
    distinct = [split([], own, contents, set())[1] for own in learnt]
    chosen = sorted({one.key for own in distinct for one in own}, key=lambda key: key_of(key, "trained"))[:most]
    kept = [[one for one in own if one.key in frozenset(chosen)] for own in distinct]
    return _placed(datasets, [Buckets(spec, multiple_of=multiple_of) for spec in datasets], kept)


def inspect(
    datasets: Sequence[DatasetSpec],
    *,
    multiple_of: int,
    seed: int = 0,
    validation_group: str = "",
    fold: Fold | None = None,
) -> tuple[Folder, ...]:
    """All images as the data check sees them. Unreadable images and captions are listed where `prepare` stops.

    Raises UserError for other mistakes in the options or folders, as `prepare` does.
    """
    buckets = [Buckets(spec, multiple_of=multiple_of) for spec in datasets]
    faults: dict[Path, str] = {}
    found = _find(datasets, contents=True, faults=faults)
    chosen = _chosen(found, seed=seed, group=validation_group, fold=fold)
    return tuple(_folders(buckets, found, chosen, faults))


@dataclass(frozen=True)
class _Found:
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


def _find(
    datasets: Sequence[DatasetSpec],
    *,
    contents: bool,
    skip_bad_images: bool = False,
    faults: dict[Path, str] | None = None,
) -> _Found:
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
    usable, usable_apart = (
        [_usable(scans_of_one, measured, spec) for scans_of_one, spec in zip(part, datasets, strict=True)]
        for part in (scans, apart)
    )
    return _Found(scans, apart, usable, usable_apart, measured)


def _chosen(found: _Found, *, seed: int, group: str, fold: Fold | None) -> set[str]:
    """The contents that are not trained: those that are held out, and those of the folders for validation."""
    samples = [sample for part in found.usable for sample in part]
    apart = {found.contents[sample.path] for part in found.apart for sample in part}
    if not apart and not any(sample.subset.validates for sample in samples):
        return set()
    if not group:
        return held_out(samples, found.contents, seed=seed, fold=fold) | apart
    everything = [*samples, *(sample for part in found.apart for sample in part)]
    groups = validation_groups.groups(everything, found.measured, how=group)
    chosen = validation_groups.held_out(samples, found.contents, groups, seed=seed, how=group, fold=fold)
    return validation_groups.whole_groups(chosen | apart, groups)


def _folders(
    buckets: Sequence[Buckets],
    found: _Found,
    chosen: set[str],
    faults: Mapping[Path, str] = NO_FAULTS,
) -> Iterator[Folder]:
    """One a subset, and one for its validation_dir."""
    for number, own_buckets in enumerate(buckets):
        samples: dict[SubsetSpec, list[Sample]] = {}
        for sample in (*found.usable[number], *found.apart[number]):
            samples.setdefault(sample.subset, []).append(sample)
        for scan in (*found.scans[number], *found.beside[number]):
            subset, own = scan.summary.subset, _files(scan)
            pictures = [
                picture_of(
                    sample, own_buckets, found.measured[sample.path], held_out=found.contents[sample.path] in chosen
                )
                for sample in samples.get(subset, ())
            ]
            at_fault = {path: why for path, why in faults.items() if path in own or path.parent == subset.image_dir}
            yield Folder(subset, subset.source, tuple(pictures), at_fault)


def _files(scan: Scan) -> set[Path | None]:
    """The images and masks of a subset."""
    return {path for sample in scan.samples for path in (sample.path, sample.mask)}


def prepare_to_measure(dataset: DatasetSpec, *, multiple_of: int, skip_bad_images: bool = False) -> Prepared:
    """All images of a data set as validation has those that it holds out: each different image once, with its content
    as its key, cut in the middle. Raises as `prepare` does."""
    scans = [_scanned(plain(subset), 0, None) for subset in dataset.subsets]
    found = [sample for scan in scans for sample in scan.samples]
    paths = [*(sample.path for sample in found), *(sample.mask for sample in found if sample.mask is not None)]
    measured, bad = check_images(paths, contents=True)
    report_bad_images(bad, skip=skip_bad_images)
    usable = _usable(scans, measured, dataset)
    if not usable:
        raise UserError(f"{_origins(dataset)}: no image can be read")
    _, distinct = split([], usable, {path: one.content for path, one in measured.items()}, set())
    return _placed([dataset], [Buckets(dataset, multiple_of=multiple_of)], [distinct])


def _placed(
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


def _shares(spec: DatasetSpec, to_train: Sequence[Sample]) -> Shares | None:
    """How often each folder of a data set is drawn; None where repeats decide. The batches of an epoch are full."""
    if not draws_by_shares(spec):
        return None
    due: Counter[SubsetSpec] = Counter()
    for sample in to_train:
        due[sample.subset] += sample.repeats
    length, shares = shares_of(spec, due)
    if length > _MOST_DRAWS:
        raise UserError(
            f"{_origins(spec)}: with these shares an epoch would have {length:.0f} images, and {_MOST_DRAWS} are the "
            "most: one share leaves too little for the others"
        )
    batches = max(1, math.ceil(length / spec.batch_size - 1e-6))
    return batches * spec.batch_size, shares


def _usable(scans: Sequence[Scan], measured: dict[Path, Measured], spec: DatasetSpec) -> list[Sample]:
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


def _why(spec: DatasetSpec, usable: Sequence[Sample], to_train: Sequence[Sample]) -> str:
    """Why a data set has nothing to train."""
    if not usable and spec.skip_image_resolution is not None:
        width, height = spec.skip_image_resolution
        return f": none is larger than the {width} × {height} of skip_image_resolution"
    if any(sample.subset.learns for sample in usable) and len(to_train) < len(usable):
        return ": all of them are held out for validation: a smaller validation_split leaves some"
    return ", or only regularisation images"


def _refuse_endless_epoch(samples: Sequence[Sample]) -> None:
    """Each draw of an epoch is an entry in a list: a typing mistake in the repeats would fill the memory."""
    draws = sum(sample.repeats for sample in samples)
    if draws > _MOST_DRAWS:
        most = max(samples, key=lambda sample: sample.repeats)
        raise UserError(
            f"{most.subset.origin}: {most.repeats} repeats of each image in {most.subset.source}: an epoch would have "
            f"{draws} images, and {_MOST_DRAWS} are the most"
        )


def _scan(subset: SubsetSpec, index: int, once: dict[SubsetSpec, Scan], faults: dict[Path, str] | None) -> Scan:
    """The samples of a subset, with keys for this index. `once`: those that have been scanned, for another size."""
    if subset in once:
        samples = [replace(sample, key=f"{index}/{sample.key.partition('/')[2]}") for sample in once[subset].samples]
        return once[subset]._replace(samples=samples)
    once[subset] = _scanned(subset, index, faults)
    return once[subset]


def _scanned(subset: SubsetSpec, index: int, faults: dict[Path, str] | None) -> Scan:
    scan = dreambooth.scan(subset, index, faults) if subset.metadata_file is None else metadata.scan(subset, index)
    samples = find_masks(scan.samples)
    if subset.sentences:
        samples = [replace(sample, caption="\n".join(subset.sentences)) for sample in samples]
    return scan._replace(samples=samples)


def _is_readable(sample: Sample, measured: dict[Path, Measured]) -> bool:
    return sample.path in measured and (sample.mask is None or sample.mask in measured)


def _with_measures(samples: Sequence[Sample], measured: dict[Path, Measured], *, bucketed: bool) -> list[Sample]:
    """The readable samples of a subset with their sizes and, where they are used, faces."""
    readable = [
        replace(sample, size=measured[sample.path].size) for sample in samples if _is_readable(sample, measured)
    ]
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


def _counted(
    scans: Sequence[Scan],
    measured: dict[Path, Measured],
    usable: Sequence[Sample],
    to_train: Sequence[Sample],
    used: Sequence[Sample],
    shares: Shares | None,
) -> Iterator[SubsetSummary]:
    """The summaries of a data set's subsets, with how many images are trained, held out and too small."""
    repeats: dict[SubsetSpec, list[float]] = {}
    for sample in used:
        repeats.setdefault(sample.subset, []).append(sample.repeats)
    are_usable = Counter(sample.subset for sample in usable)
    are_left = Counter(sample.subset for sample in to_train)
    are_used = Counter(sample.subset for sample in used)
    for found, summary in scans:
        subset = summary.subset
        unused = are_left[subset] - are_used[subset]
        if unused:
            logger.warning("%s: %d regularisation images are more than needed", subset.image_dir, unused)
        bad = sum(not _is_readable(sample, measured) for sample in found)
        draws = repeats.get(subset, [0])
        if shares is not None and subset in shares[1]:
            draws = [shares[0] * shares[1][subset] / len(draws)] * len(draws)
        yield replace(
            summary,
            images=are_used[subset],
            draws=sum(draws),
            least=min(draws),
            most=max(draws),
            by_shares=shares is not None,
            bad_images=bad,
            too_small=len(found) - bad - are_usable[subset],
            unused_reg_images=unused,
            held_out=are_usable[subset] - are_left[subset],
        )


def _origins(spec: DatasetSpec) -> str:
    return ", ".join(dict.fromkeys(subset.origin for subset in spec.subsets)) or "data set without subsets"
