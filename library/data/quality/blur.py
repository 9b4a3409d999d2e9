"""Blurred images."""

from __future__ import annotations

from collections.abc import Iterator

from library.data.quality.folder import Finding, Folder, Item, Level

BLURRED = 0.5
"""Of `look.blur_effect`. Measured on 1,383 emoji of 64 × 64 pixels, 14 photographs and 32 parts of photographs of 256 ×
256 (DECISIONS.md, 2026-11-29): the sharp ones are at most at 0.43."""


def check(folder: Folder) -> Iterator[Finding]:
    """Images whose blur is at `BLURRED` or above, the worst first."""
    found = sorted(
        (picture for picture in folder.pictures if picture.look.blur >= BLURRED), key=lambda picture: -picture.look.blur
    )
    if found:
        yield Finding(
            "blurred",
            Level.SHOULD,
            f"{len(found)} of {len(folder.pictures)} images are blurred (blur of {BLURRED:g} or more, where sharp images "
            "have 0.15 to 0.4)",
            "look at them: a LoRA learns blur as part of its subject",
            tuple(
                Item(picture.path, "one colour" if picture.look.blur == 1 else f"blur {picture.look.blur:.2f}")
                for picture in found
            ),
        )
