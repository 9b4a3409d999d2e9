"""Blurred images."""

from __future__ import annotations

from collections.abc import Iterator

from library.data.quality.folder import Data, Finding, Folder, Item, Level

BLURRED = 0.5
"""Of `look.blur_effect`. Of 1,383 emoji of 64 × 64 pixels and 14 photographs one is above; blurred by a Gaussian of 1.5
pixels 96 and 64 % of them are, by 2 pixels 99.8 and 86 %, by 3 pixels all (DECISIONS.md, 2026-11-29)."""


def check(folder: Folder, data: Data) -> Iterator[Finding]:
    """Images whose blur is at `BLURRED` or above, the worst first."""
    found = sorted(
        (picture for picture in folder.pictures if picture.look.blur >= BLURRED), key=lambda picture: -picture.look.blur
    )
    if found:
        yield Finding(
            "blurred",
            Level.SHOULD,
            f"{len(found)} of {len(folder.pictures)} images are blurred: their blur is {BLURRED:g} or more, that of "
            "sharp images 0.1 to 0.4",
            "look at them: a LoRA learns blur as part of its subject",
            tuple(
                Item(picture.path, "one colour" if picture.look.blur == 1 else f"blur {picture.look.blur:.2f}")
                for picture in found
            ),
        )
