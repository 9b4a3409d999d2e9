"""From the specs of the data sets to measured, balanced samples, each in its bucket."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.data.dataset_config import is_validated
from library.config.data.shares import draws_by_shares, shares_of
from library.data import validation_groups
from library.data.buckets import Buckets
from library.data.captions import warn_of_captions_without_tags
from library.data.check import Measured, check_images, report_bad_images
from library.data.held_out import Fold, held_out, plain, split, tell
from library.data.mix import Shares
from library.data.prepared import MOST_DRAWS, Prepared, placed
from library.data.quality.folder import Folder, picture_of
from library.data.samples import Sample, Scan, SubsetSummary
from library.data.sources import dreambooth
from library.data.sources.find import Found, find, is_readable, scanned, usable
from library.errors import UserError
from library.rng import key_of

if TYPE_CHECKING:
    from library.config.data.dataset_config import DatasetSpec, SubsetSpec

logger = logging.getLogger(__name__)
NO_FAULTS: Mapping[Path, str] = {}


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
    found = find(datasets, contents=is_validated(datasets) or measures, skip_bad_images=skip_bad_images)
    measured, contents = found.measured, found.contents
    chosen = _chosen(found, seed=seed, group=validation_group, fold=fold)
    train: list[list[Sample]] = []
    validation: list[list[Sample]] = []
    summaries: list[SubsetSummary] = []
    shares: list[Shares | None] = []
    told: list[tuple[SubsetSpec, ...]] = []
    for spec, of_dataset, samples, others in zip(datasets, found.scans, found.usable, found.apart, strict=True):
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
    to_validate_on = placed(datasets, buckets, validation) if any(validation) else None
    folders = tuple(_folders(buckets, found, chosen))
    prepared = replace(
        placed(datasets, buckets, train, shares), summaries=summaries, validation=to_validate_on, folders=folders
    )
    if not measures:
        return prepared
    firsts: dict[str, Path] = {}
    for sample in (sample for part in found.usable for sample in part):
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
    return placed(datasets, [Buckets(spec, multiple_of=multiple_of) for spec in datasets], kept)


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
    found = find(datasets, contents=True, faults=faults)
    chosen = _chosen(found, seed=seed, group=validation_group, fold=fold)
    return tuple(_folders(buckets, found, chosen, faults))


def _chosen(found: Found, *, seed: int, group: str, fold: Fold | None) -> set[str]:
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
    found: Found,
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
            yield Folder(subset, subset.source, tuple(pictures), at_fault, own_buckets.spec)


def _files(scan: Scan) -> set[Path | None]:
    """The images and masks of a subset."""
    return {path for sample in scan.samples for path in (sample.path, sample.mask)}


def prepare_to_measure(dataset: DatasetSpec, *, multiple_of: int, skip_bad_images: bool = False) -> Prepared:
    """All images of a data set as validation has those that it holds out: each different image once, with its content
    as its key, cut in the middle. Raises as `prepare` does."""
    scans = [scanned(plain(subset), 0, None) for subset in dataset.subsets]
    found = [sample for scan in scans for sample in scan.samples]
    paths = [*(sample.path for sample in found), *(sample.mask for sample in found if sample.mask is not None)]
    measured, bad = check_images(paths, contents=True)
    report_bad_images(bad, skip=skip_bad_images)
    readable = usable(scans, measured, dataset)
    if not readable:
        raise UserError(f"{_origins(dataset)}: no image can be read")
    _, distinct = split([], readable, {path: one.content for path, one in measured.items()}, set())
    return placed([dataset], [Buckets(dataset, multiple_of=multiple_of)], [distinct])


def _shares(spec: DatasetSpec, to_train: Sequence[Sample]) -> Shares | None:
    """How often each folder of a data set is drawn; None where repeats decide. The batches of an epoch are full."""
    if not draws_by_shares(spec):
        return None
    due: Counter[SubsetSpec] = Counter()
    for sample in to_train:
        due[sample.subset] += sample.repeats
    length, shares = shares_of(spec, due)
    if length > MOST_DRAWS:
        raise UserError(
            f"{_origins(spec)}: with these shares an epoch would have {length:.0f} images, and {MOST_DRAWS} are the "
            "most: one share leaves too little for the others"
        )
    batches = max(1, math.ceil(length / spec.batch_size - 1e-6))
    return batches * spec.batch_size, shares


def _why(spec: DatasetSpec, usable: Sequence[Sample], to_train: Sequence[Sample]) -> str:
    """Why a data set has nothing to train."""
    if not usable and spec.skip_image_resolution is not None:
        width, height = spec.skip_image_resolution
        return f": none is larger than the {width} × {height} of skip_image_resolution"
    if any(sample.subset.learns for sample in usable) and len(to_train) < len(usable):
        return ": all of them are held out for validation: a smaller validation_split leaves some"
    return ", or only regularisation images"


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
        bad = sum(not is_readable(sample, measured) for sample in found)
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
