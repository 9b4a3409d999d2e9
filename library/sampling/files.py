"""The files of samples: their names, which are kohya's, and a picture of each prompt's samples over time."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.files.atomic import replacing

MOST = 12  # moments in a picture, including the first and the last
_SIDE = 192  # pixels of an image in it, at most
_COLUMNS = 6


@dataclass(frozen=True)
class Sample:
    """One image. `order`: its step, or epoch; `prompt`: the number of its prompt."""

    path: Path
    moment: str  # "step 100", "epoch 3", "before training"
    order: int
    prompt: int


def file_name(name: str | None, moment: str, prompt: int, seed: int | None) -> str:
    """`moment`: "000100" for a step, "e000003" for an epoch. `seed`: the prompt's own."""
    first = "" if name is None else f"{name}_"
    last = "" if seed is None else f"_{seed}"
    return f"{first}{moment}_{prompt:02d}_{time.strftime('%Y%m%d%H%M%S')}{last}.png"


def find(folder: Path, name: str | None, *, since: float) -> list[Sample]:
    """The samples of the run of this `--output_name` that began at `since`: by prompt, then by time. If there are
    several of one moment and prompt, the newest."""
    first = "" if name is None else f"{re.escape(name)}_"
    pattern = re.compile(rf"{first}(e?)(\d{{6,}})_(\d{{2,}})_(\d{{14}})(_-?\d+)?\.png")
    newest: dict[tuple[str, int], Sample] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = pattern.fullmatch(path.name)
        if found and path.stat().st_mtime >= int(since):
            number, prompt = int(found[2]), int(found[3])
            moment = f"{'epoch' if found[1] else 'step'} {number}" if number else "before training"
            newest[moment, prompt] = Sample(path, moment, number, prompt)
    return sorted(newest.values(), key=lambda sample: (sample.prompt, sample.order))


def some(samples: Sequence[Sample], most: int = MOST) -> list[Sample]:
    """At most `most` of them, evenly over time, including the first and the last."""
    count = min(most, len(samples))
    return [samples[i] for i in sorted({round(i * (len(samples) - 1) / max(count - 1, 1)) for i in range(count)})]


def draw_over_time(path: Path, samples: Sequence[Sample], *, prompt: str) -> None:
    """A PNG of one prompt's samples side by side, each with its moment below it."""
    from PIL import Image, ImageDraw, ImageFont

    shown, font = some(samples), ImageFont.load_default(13)
    tiles = []
    for sample in shown:
        with Image.open(sample.path) as opened:
            tile = opened.convert("RGB")
            tile.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        tiles.append(tile)
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    columns = min(_COLUMNS, len(tiles))
    cell, row, top = max(width, 88) + 8, height + 28, 26
    sheet = Image.new("RGB", (columns * cell + 8, -(-len(tiles) // columns) * row + top + 4), "white")
    pen = ImageDraw.Draw(sheet)
    text = " ".join(prompt.split())  # files of prompts can have lines in them
    while text and pen.textlength(text, font) > sheet.width - 16:
        text = text.removesuffix("…")[:-1] + "…"
    pen.text((8, 6), text, "black", font)
    for i, (sample, tile) in enumerate(zip(shown, tiles, strict=True)):
        left, up = 8 + i % columns * cell, top + i // columns * row
        sheet.paste(tile, (left, up))
        pen.text((left, up + height + 4), sample.moment, "#444444", font)
    with replacing(path) as beside:
        sheet.save(beside, format="PNG")
