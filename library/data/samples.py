"""The samples that every source of data delivers: images, their captions, and how often each is seen."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from library.config.data.dataset_config import SubsetSpec

logger = logging.getLogger(__name__)

Size = tuple[int, int]
"""(width, height) in pixels."""

UNMEASURED: Size = (0, 0)


class Face(NamedTuple):
    """Where a face is in an image, in pixels: its centre and its size."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Sample:
    """One image of one subset.

    `key` names it in every keyed draw: "{subset index}/{path inside the subset}", the same on every machine.
    `caption` is the text as the source has it, several lines if `enable_wildcard` is set;
    `captions.caption_text` makes the trained text of it.
    `captioned`: the source has a caption of its own for it, be it empty.
    `size` is that of the upright image, `UNMEASURED` until the image has been opened. `mask` is an image that weighs
    the loss; `face` is set if the crops are made around it.
    """

    path: Path
    key: str
    caption: str
    subset: SubsetSpec
    size: Size
    repeats: int
    mask: Path | None = None
    face: Face | None = None
    captioned: bool = True


@dataclass(frozen=True)
class SubsetSummary:
    """A subset's counts, for the dry run and the log. `images` counts those that are trained; `draws` are theirs in an
    epoch, together, and `least` and `most` those of one image: where shares decide (`by_shares`), means."""

    subset: SubsetSpec
    images: int
    draws: float = 0
    least: float = 0
    most: float = 0
    by_shares: bool = False
    bad_images: int = 0
    too_small: int = 0  # for the data set's skip_image_resolution
    unused_reg_images: int = 0
    held_out: int = 0
    captions_found: int = 0
    captions_missing: int = 0
    captions_empty: int = 0
    captions_of_several_lines: int = 0
    shared_names: int = 0
    other_image_files: int = 0
    subfolders_with_images: int = 0


class Scan(NamedTuple):
    """The samples that a source found in a subset, before their sizes are read."""

    samples: list[Sample]
    summary: SubsetSummary


def warn_of(place: Path, findings: Iterable[tuple[Sequence[object], str]]) -> None:
    """Log a warning for each kind of finding: how many there are, what that means, and one of them."""
    for found, what in findings:
        if found:
            logger.warning("%s: %d %s (such as %s)", place, len(found), what, found[0])
