"""Groups of images of which all or none are held out for validation, so that no image is judged by its like."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from PIL import ExifTags

from library.config.options.validation import NAME
from library.data.check import Measured
from library.data.held_out import Fold
from library.data.images import open_image
from library.data.quality.duplicates import near_duplicates
from library.data.quality.near import joined
from library.data.samples import Sample
from library.errors import UserError
from library.progress import bar
from library.rng import key_of

logger = logging.getLogger(__name__)

Group = tuple[str, frozenset[str]]
"""Its name, and the contents of its images (`check.Measured.content`)."""

Key = Callable[[Path], str | None]
"""The name of an image's group; None for an image that is a group of its own."""


def groups(samples: Iterable[Sample], measured: Mapping[Path, Measured], *, how: str) -> list[Group]:
    """The groups of all images, however many have one image alone. Copies are in one group, whatever `how` says.

    `how`: as `--validation_group` has it. Raises UserError for a pattern that no name matches.
    """
    paths = list(dict.fromkeys(sample.path for sample in samples))
    names = _names(paths, measured, how)
    contents = [measured[path].content for path in paths]
    first: dict[tuple[str, str], int] = {}  # of each group's name, and of each content
    pairs = []
    for index, (path, content) in enumerate(zip(paths, contents, strict=True)):
        own = [("content", content), *([("name", name)] if (name := names[path]) is not None else [])]
        pairs += [(first.setdefault(key, index), index) for key in own]
    return [
        (names[paths[members[0]]] or paths[members[0]].name, frozenset(contents[index] for index in members))
        for members in joined(pairs)
    ]


def held_out(
    samples: Sequence[Sample],
    contents: Mapping[Path, str],
    groups: Sequence[Group],
    *,
    seed: int,
    how: str,
    fold: Fold | None = None,
) -> set[str]:
    """The contents of the groups that are held out: as nearly `validation_split` of the images as whole groups allow.

    The groups come in an order drawn from the seed and their contents alone, with `how` "latest" the newest first; one
    is taken if that comes nearer to the wanted number. With a `fold` all groups are in as many parts of nearly the same
    size, and one part is held out. Raises UserError where that holds out nothing or everything.
    """
    shares: dict[str, float] = {}  # of the images that can be held out
    for sample in samples:
        if sample.subset.learns and sample.subset.validation_split:
            shares.setdefault(contents[sample.path], sample.subset.validation_split)
    if not shares:
        return set()
    own_seed = _seed(samples, seed)
    wanted = int(sum(shares.values()) + 0.5)
    sizes = {group: sum(content in shares for content in group[1]) for group in groups}
    usable = [group for group in groups if sizes[group]]
    if len(usable) == 1:
        raise UserError(
            f"--validation_group {how}: all {len(shares)} images are one group ({usable[0][0]}): holding it out would "
            "leave nothing to train"
        )
    if fold is not None:
        return _part(usable, sizes, fold, own_seed, how)
    if not wanted:
        raise UserError(f"validation_split of {len(shares)} images is none: at least {0.5 / len(shares) + 0.0005:.3f}")
    if how == "latest":
        usable.sort(key=lambda group: group[0], reverse=True)
    else:
        usable.sort(key=lambda group: key_of(own_seed, min(group[1]), "held out"))
    chosen: list[Group] = []
    taken = 0
    for group in usable:
        if abs(taken + sizes[group] - wanted) < abs(taken - wanted):
            chosen.append(group)
            taken += sizes[group]
        elif how == "latest":  # older images must not be held out while newer ones are trained
            break
    if not chosen:
        size = sizes[usable[0]] if how == "latest" else min(sizes[group] for group in usable)
        which = f"the newest date, {usable[0][0]}, has" if how == "latest" else "the smallest group has"
        raise UserError(
            f"--validation_group {how}: {which} {size} of {len(shares)} images, and validation_split asks for "
            f"{wanted}; with more than {size / 2 / len(shares):.3f} it is held out"
        )
    logger.info(
        "--validation_group %s: %d of %d groups are held out, %d images (validation_split: %d)",
        *(how, len(chosen), len(usable), taken, wanted),
    )
    return {content for group in chosen for content in group[1]}


def _part(groups: Sequence[Group], sizes: Mapping[Group, int], fold: Fold, seed: int, how: str) -> set[str]:
    """One of several parts: from the largest group to the smallest, each goes into the part with the fewest images."""
    part, parts = fold
    if len(groups) < parts:
        raise UserError(f"--validation_group {how}: {parts} parts of {len(groups)} groups: at most as many")
    contents: list[set[str]] = [set() for _ in range(parts)]
    images = [0] * parts
    for group in sorted(groups, key=lambda group: (-sizes[group], key_of(seed, min(group[1]), "held out"))):
        smallest = images.index(min(images))
        contents[smallest] |= group[1]
        images[smallest] += sizes[group]
    logger.info(
        "--validation_group %s: %d groups in %d parts of %d to %d images",
        *(how, len(groups), parts, min(images), max(images)),
    )
    return contents[part - 1]


def whole_groups(contents: Iterable[str], groups: Sequence[Group]) -> set[str]:
    """All contents of the groups that have one of `contents`."""
    some = set(contents)
    return some.union(*(members for _, members in groups if not some.isdisjoint(members)))


def _seed(samples: Sequence[Sample], seed: int) -> int:
    """The subsets' validation_seed, which must be the same in all: groups may reach over subsets."""
    own = {sample.subset.validation_seed for sample in samples if sample.subset.learns}
    if len(own) > 1:
        raise UserError("--validation_group: give all subsets the same validation_seed: a group may reach over several")
    return seed if own <= {None} else next(iter(own)) or 0


def _names(paths: Sequence[Path], measured: Mapping[Path, Measured], how: str) -> dict[Path, str | None]:
    """The name of each image's group."""
    if how == "folder":
        return {path: str(path.parent) for path in paths}
    if how in ("date", "latest"):
        return dict(_dates(paths))
    if how == "near":
        near = near_duplicates((path, measured[path].look, measured[path].content) for path in paths)
        return {path: f"near-duplicates {near[path]}" if path in near else None for path in paths}
    return dict(_by_pattern(paths, how))


def _by_pattern(paths: Sequence[Path], how: str) -> dict[Path, str | None]:
    """By the groups of a regular expression that is searched for in the file's name without its extension."""
    pattern = re.compile(how.removeprefix(NAME))
    matches = {path: pattern.search(path.stem) for path in paths}
    unmatched = [path for path, match in matches.items() if match is None]
    if len(unmatched) == len(paths):
        raise UserError(f"--validation_group {how}: no image's name matches it, such as {paths[0].stem}")
    if unmatched:
        logger.warning(
            "--validation_group %s: %d of %d names do not match it, and are groups of their own (such as %s)",
            *(how, len(unmatched), len(paths), unmatched[0].name),
        )
    return {
        path: None if match is None else ", ".join(part or "" for part in match.groups())
        for path, match in matches.items()
    }


def _dates(paths: Sequence[Path]) -> dict[Path, str]:
    """The day of each image, as 2026-11-29: when the photograph was taken, else when the file was changed."""
    taken = {path: date_taken(path) for path in bar(paths, desc="dates", total=len(paths), unit="img")}
    without = sum(day is None for day in taken.values())
    if without:
        logger.warning(
            "--validation_group: %d of %d images have no date in EXIF: that of their file is taken", without, len(paths)
        )
    return {
        path: datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d") if day is None else day
        for path, day in taken.items()
    }


def date_taken(path: Path) -> str | None:
    """The day in an image's EXIF block, as 2026-11-29: DateTimeOriginal, else DateTimeDigitized, else DateTime."""
    tags = ExifTags.Base
    with open_image(path) as image:
        found: list[object] = []
        with contextlib.suppress(Exception):  # Pillow raises anything on a broken EXIF block
            block = image.getexif()
            details = block.get_ifd(ExifTags.IFD.Exif)
            found = [details.get(tags.DateTimeOriginal), details.get(tags.DateTimeDigitized), block.get(tags.DateTime)]
    for text in found:
        with contextlib.suppress(ValueError):
            return datetime.strptime(str(text)[:10], "%Y:%m:%d").strftime("%Y-%m-%d")
    return None
