"""A labelled grid of images as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from library.guidance.contact_sheet import FAINT, INK, LINE, font, wrapped

GAP = 8
LABELS = 150  # pixels of width of the rows' labels
SMALLEST = 150  # pixels of width of a column: labels stay readable above small images
_LINES = 5  # of a head or a prompt


class Tile(NamedTuple):
    """`text`: a line below the image; empty for none."""

    image: Image.Image
    text: str


def grid(rows: Sequence[Sequence[Tile]], *, heads: Sequence[str], labels: Sequence[str], side: int) -> Image.Image:
    """The tiles in rows, `heads` above the columns and `labels` left of the rows. Images are reduced to `side` pixels,
    and small ones enlarged by a whole factor."""
    shown = [[_sized(tile.image, side) for tile in row] for row in rows]
    width = max(SMALLEST, *(image.width for row in shown for image in row))
    titles = [wrapped(head, font(), width=width, most=_LINES) for head in heads]
    beside = [_label(label) for label in labels]
    below = LINE if any(tile.text for row in rows for tile in row) else 0
    top = GAP + LINE * max(map(len, titles)) + 4
    heights = [
        max(max(image.height for image in row) + below, LINE * len(lines)) + GAP
        for row, lines in zip(shown, beside, strict=True)
    ]
    sheet = Image.new("RGB", (GAP + LABELS + (width + GAP) * len(heads), top + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for c, lines in enumerate(titles):
        for i, line in enumerate(lines):
            pen.text((GAP + LABELS + c * (width + GAP), GAP + i * LINE), line, INK, font())
    for r, (row, images) in enumerate(zip(rows, shown, strict=True)):
        y = top + sum(heights[:r])
        for i, line in enumerate(beside[r]):
            pen.text((GAP, y + i * LINE), line, INK, font())
        for c, (tile, image) in enumerate(zip(row, images, strict=True)):
            x = GAP + LABELS + c * (width + GAP)
            sheet.paste(image, (x, y))
            pen.text((x, y + image.height + 1), tile.text, FAINT, font())
    return sheet


def _label(label: str) -> list[str]:
    """The prompt in a few lines, and its seed in one of its own."""
    return [line for part in label.split("\n") for line in wrapped(part, font(), width=LABELS - GAP, most=_LINES)]


def _sized(image: Image.Image, side: int) -> Image.Image:
    longest = max(image.size)
    if longest > side:
        scale = side / longest
        small = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        return image.resize(small, Image.Resampling.LANCZOS)
    factor = max(1, min(side, SMALLEST) // longest)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
