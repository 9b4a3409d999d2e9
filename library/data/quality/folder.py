"""The images of a folder as the checks see them, and the checks' findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.buckets import Buckets, Placement
from library.data.captions import as_written
from library.data.samples import Sample, Size

if TYPE_CHECKING:
    from library.config.data.dataset_config import DatasetSpec, SubsetSpec
    from library.data.check import Measured
    from library.data.quality.look import Look


_NO_SETTINGS = ("subsets", "image_dir", "metadata_file", "origin")


class Level(Enum):
    """How much a finding matters, worst first; the value is its word."""

    MUST = "to fix"  # training stops there, or learns a mistake
    SHOULD = "to look at"  # it usually makes a LoRA worse
    NOTE = "to know"  # often wanted

    @property
    def rank(self) -> int:
        return list(Level).index(self)


@dataclass(frozen=True)
class Picture:
    """An image of a folder. `text`: its caption as it is trained before anything is drawn; `captioned`: it has one of
    its own, not its folder's. `placement` None: there is no bucket for an image so small. `content`: see
    `check.Measured`."""

    path: Path
    text: str
    captioned: bool
    size: Size
    placement: Placement | None
    look: Look
    content: str
    held_out: bool

    @property
    def enlargement(self) -> float:
        """The factor by which training enlarges it; at most 1 where it does not."""
        if self.placement is None:
            return 1.0
        return max(after / before for after, before in zip(self.placement.resized, self.size, strict=True))


def picture_of(sample: Sample, buckets: Buckets, measured: Measured, *, held_out: bool) -> Picture:
    """The checks' view of a sample that has been measured."""
    placement: Placement | None
    try:
        placement = buckets.place(sample.size, keep_size=sample.subset.random_crop)
    except ValueError:
        placement = None
    return Picture(
        path=sample.path,
        text=as_written(sample.caption, sample.subset)[0],
        captioned=sample.captioned,
        size=sample.size,
        placement=placement,
        look=measured.look,
        content=measured.content,
        held_out=held_out,
    )


@dataclass(frozen=True)
class Folder:
    """A subset at one resolution. `faults`: its images and caption files that cannot be read, with the reasons.
    `dataset`: the one that it is in."""

    subset: SubsetSpec
    source: Path
    pictures: tuple[Picture, ...]
    faults: Mapping[Path, str] = field(default_factory=dict)
    dataset: DatasetSpec | None = None

    def settings(self) -> dict[str, object]:
        """The options of the subset and of its data set, by name, without the images that they are about."""
        of_dataset = {} if self.dataset is None else vars(self.dataset)
        found = {**of_dataset, **vars(self.subset)}
        return {name: value for name, value in found.items() if name not in _NO_SETTINGS}


@dataclass(frozen=True)
class Data:
    """The facts that a check may need beside its folder.

    `pictures`: those of all folders. `near`: the number of the group of each image that has near-duplicates anywhere in
    the data, counted from 1. `count_tokens`, `token_limit`: of the model, whose tokenizer decides what is cut.
    """

    pictures: tuple[Picture, ...]
    near: Mapping[Path, int]
    count_tokens: Callable[[str], int]
    token_limit: int


@dataclass(frozen=True)
class Item:
    """A file of a finding. `group`: those of one group belong together, such as copies of one image; 0: to none."""

    path: Path
    detail: str
    group: int = 0


@dataclass(frozen=True)
class Finding:
    """A kind of flaw in one folder. `text`: one sentence with the numbers; `advice`: what to do. `items`: all files."""

    name: str
    level: Level
    text: str
    advice: str
    items: tuple[Item, ...] = ()


Check = Callable[[Folder, Data], Iterator[Finding]]
"""A check: finds the flaws of one kind or several in a folder."""
