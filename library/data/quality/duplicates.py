"""Images that are nearly the same: copies, other versions of one picture, and series."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from library.data.quality.folder import Data, Finding, Folder, Item, Level, Picture
from library.data.quality.look import UNIT, Look
from library.data.quality.near import ALIKE, joined, near_groups
from library.data.quality.statistics import effective_number


def near_duplicates(images: Iterable[tuple[Path, Look, str]]) -> dict[Path, int]:
    """The groups of images that have the same pixels or look nearly alike. `images`: file, look and content of each, as
    of `check.Measured`; a file may come several times."""
    distinct = {path: (look, content) for path, look, content in images}
    if not distinct:
        return {}
    same: dict[str, list[int]] = {}
    for index, (_, content) in enumerate(distinct.values()):
        if content:
            same.setdefault(content, []).append(index)
    groups = near_groups(np.stack([look.signature for look, _ in distinct.values()]))
    groups = joined([*groups, *(copies for copies in same.values() if len(copies) > 1)])
    paths = list(distinct)
    return {paths[index]: number for number, group in enumerate(groups, 1) for index in group}


def check(folder: Folder, data: Data) -> Iterator[Finding]:
    """Near-duplicates within the folder, series in it, and held-out images with a near-duplicate that is trained."""
    near = data.near
    own: dict[int, list[Picture]] = {}
    for picture in folder.pictures:
        if picture.path in near:
            own.setdefault(near[picture.path], []).append(picture)
    groups = [found for found in own.values() if len(found) > 1]
    whole = len(folder.pictures)
    if groups:
        more = sum(len(group) - 1 for group in groups)
        yield Finding(
            "near-duplicates",
            Level.SHOULD,
            f"{more} of {whole} images are nearly the same as another one "
            f"({len(groups)} group{'s' * (len(groups) != 1)})",
            "keep one of each group: the others count as further repeats of the same picture",
            tuple(
                Item(picture.path, _versions(picture, group), number)
                for number, group in enumerate(sorted(groups, key=len, reverse=True), 1)
                for picture in group
            ),
        )
    yield from _series(folder, near)
    yield from _leaks(folder, data)


def _versions(picture: Picture, group: Sequence[Picture]) -> str:
    copies = sum(picture.content == other.content for other in group) - 1 if picture.content else 0
    return f"{picture.size[0]} × {picture.size[1]}" + (", the same pixels" if copies else "")


def _series(folder: Folder, near: Mapping[Path, int]) -> Iterator[Finding]:
    """Images whose names differ in one number that goes up by one, and which look alike but not nearly the same."""
    by_name: dict[tuple[Path, str, str, int], Picture] = {}
    for picture in folder.pictures:
        if found := re.fullmatch(r"(.*?)(\d{1,15})(\D*)", picture.path.stem):
            by_name[picture.path.parent, found[1], found[3], int(found[2])] = picture
    pairs = []
    order = {picture.path: index for index, picture in enumerate(folder.pictures)}
    for (parent, front, back, number), picture in by_name.items():
        other = by_name.get((parent, front, back, number + 1))
        if other is None or near.get(picture.path, 0) == near.get(other.path, -1):
            continue
        product = int(picture.look.signature.astype(np.int64) @ other.look.signature.astype(np.int64))
        if product >= ALIKE * UNIT**2:
            pairs.append((order[picture.path], order[other.path]))
    groups = joined(pairs)
    if groups:
        count = sum(map(len, groups))
        yield Finding(
            "series",
            Level.NOTE,
            f"{count} of {len(folder.pictures)} images are alike and numbered one after another: {len(groups)} series",
            "a few of each series teach as much; --validation_group keeps a series on one side of the split",
            tuple(
                Item(folder.pictures[index].path, f"{len(group)} images", number)
                for number, group in enumerate(sorted(groups, key=len, reverse=True), 1)
                for index in group
            ),
        )


def _leaks(folder: Folder, data: Data) -> Iterator[Finding]:
    near = data.near
    trained: dict[int, Path] = {}
    for picture in data.pictures:
        if not picture.held_out and picture.path in near:
            trained.setdefault(near[picture.path], picture.path)
    found = [picture for picture in folder.pictures if picture.held_out and near.get(picture.path) in trained]
    held_out = sum(picture.held_out for picture in folder.pictures)
    if found:
        yield Finding(
            "validation knows training",
            Level.SHOULD,
            f"{len(found)} of {held_out} held-out images are nearly the same as one that is trained: their loss falls "
            "as the training images are learnt by heart",
            "--validation_group near keeps near-duplicates on one side",
            tuple(Item(picture.path, f"as {trained[near[picture.path]]}") for picture in found),
        )


def diversity(folder: Folder, near: Mapping[Path, int]) -> float:
    """The effective number of different images, as a share of all: near-duplicates count as one."""
    keys = [near.get(picture.path, picture.path) for picture in folder.pictures]
    return effective_number(keys) / len(keys) if keys else 1.0
