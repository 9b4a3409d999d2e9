"""The contact sheet of the training images: each with its crop, the result beside it, and its caption."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from library.data.dataset import TrainingData
from library.data.images import open_image, to_rgb
from library.data.samples import Sample, Size
from library.data.views import View
from library.files.atomic import replacing
from library.progress import bar
from library.run.plan import Plan

logger = logging.getLogger(__name__)

MOST = 24  # images on a sheet
COLUMNS = 4
BOX = 190  # pixels of the longest side of a picture
GAP = 10
LINE = 17
CAPTION_LINES = 6
WIDTH = 2 * BOX + GAP
MARGIN = 22
INK, FAINT, PAPER = (20, 20, 20), (90, 90, 90), (232, 232, 228)
CUT, MASKED = (220, 30, 60), np.array([255.0, 105.0, 180.0], np.float32)


@dataclass(frozen=True)
class Sight:
    """One draw of a sample: what a training step gets. `mask` [1, H, W] in 0 … 1, `pixels` [3, H, W] in [-1, 1]."""

    sample: Sample
    view: View
    caption: str
    weight: float
    pixels: Tensor
    mask: Tensor | None


def draw(plan: Plan) -> Path:
    """Write the sheet of the first epoch beside where the LoRA would go; nothing is trained. Returns its path."""
    options = plan.options
    data = TrainingData(plan.prepared, seed=plan.seed, prior_loss_weight=options.data.prior_loss_weight)
    seen = list(sights(data))
    draws = sum(group.draws for group in data.groups)
    title = f"{len(seen)} of {draws} images of the first epoch, seed {plan.seed}"
    path = Path(options.output.output_dir) / f"{options.output.output_name or 'last'}-dataset.png"
    with replacing(path) as temporary:
        sheet(seen, title=title).save(temporary, format="PNG")
    logger.info("drew %s: %s. Nothing was trained (--debug_dataset)", path, title)
    return path


def sights(data: TrainingData, *, most: int = MOST) -> Iterator[Sight]:
    """The first images of the first epoch in the order of training; with many buckets, first one of each."""
    order = [draw for planned in data.plan(0) for draw in planned]
    first = {data.placements[index].bucket: number for number, (index, _) in reversed(list(enumerate(order)))}
    numbers = list(dict.fromkeys([*sorted(first.values()), *range(len(order))]))[:most]
    planned = [(order[number],) for number in sorted(numbers)]
    batches = data.batches(planned, epoch=0, loader=data.loader(workers=0))
    for one, batch in zip(bar(planned, desc="drawing", total=len(planned), unit="img"), batches, strict=True):
        (view,) = data.views(one, 0)
        assert batch.pixels is not None
        yield Sight(
            sample=batch.samples[0].sample,
            view=view,
            caption=batch.captions[0],
            weight=batch.loss_weights[0].item(),
            pixels=batch.pixels[0],
            mask=None if batch.masks is None else batch.masks[0],
        )


def sheet(seen: Sequence[Sight], *, title: str) -> Image.Image:
    """The tiles in rows under a title."""
    columns = min(COLUMNS, math.ceil(math.sqrt(len(seen))))
    rows = -(-len(seen) // columns)
    head = MARGIN + 3 * LINE
    tiles = [tile(sight) for sight in seen]
    height = max(one.height for one in tiles) + MARGIN
    image = Image.new("RGB", (columns * (WIDTH + MARGIN) + MARGIN, head + rows * height), PAPER)
    pen = ImageDraw.Draw(image)
    legend = "left: the image, cut along the red line; right: what the network sees"
    if any(sight.mask is not None for sight in seen):
        legend += ", pink where a mask keeps it from learning"
    for number, (line, colour) in enumerate(((title, INK), (legend, FAINT))):
        for part in wrapped(line, font(), width=image.width - 2 * MARGIN, most=1):
            pen.text((MARGIN, MARGIN + number * LINE), part, fill=colour, font=font())
    for number, one in enumerate(tiles):
        row, column = divmod(number, columns)
        image.paste(one, (MARGIN + column * (WIDTH + MARGIN), head + row * height))
    return image


def tile(sight: Sight) -> Image.Image:
    """The image with its crop, the network's view of it, and its facts."""
    name = shortened(sight.sample.path.name, font(), width=WIDTH)
    facts = wrapped(_sizes(sight), font(), width=WIDTH, most=1)
    facts += wrapped(_treatment(sight), font(), width=WIDTH, most=1)
    caption = wrapped(sight.caption or "(no caption)", font(), width=WIDTH, most=CAPTION_LINES)
    lines = [(line, FAINT) for line in (name, *facts)] + [(line, INK) for line in caption]
    image = Image.new("RGB", (WIDTH, BOX + GAP + len(lines) * LINE), PAPER)
    for number, picture in enumerate((_whole(sight.view), _seen(sight))):
        image.paste(picture, (number * (BOX + GAP) + (BOX - picture.width) // 2, (BOX - picture.height) // 2))
    pen = ImageDraw.Draw(image)
    for number, (line, colour) in enumerate(lines):
        pen.text((0, BOX + GAP + number * LINE), line, fill=colour, font=font())
    return image


def wrapped(text: str, font: ImageFont.FreeTypeFont, *, width: int, most: int) -> list[str]:
    """The text in at most so many lines, none wider than `width` pixels; what does not fit ends in "…"."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        rest = word
        while rest:  # a word wider than a line is broken
            fitting = next(k for k in range(len(rest), 0, -1) if k == 1 or font.getlength(rest[:k]) <= width)
            lines += [rest[:fitting]]
            rest = rest[fitting:]
    lines = lines[not lines[0] and len(lines) > 1 :]
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last}…"]
    return lines


def shortened(name: str, font: ImageFont.FreeTypeFont, *, width: int) -> str:
    """The name in `width` pixels, without its middle if need be: names of one folder often begin alike."""
    short, kept = name, len(name)
    while font.getlength(short) > width and kept > 2:
        kept -= 2
        short = f"{name[: kept // 2]}…{name[-(kept // 2) :]}"
    return short


def font() -> ImageFont.FreeTypeFont:
    """A font of Matplotlib's, so that the sheet looks the same everywhere."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 13)


def _sizes(sight: Sight) -> str:
    original, resized, bucket = (f"{w} × {h}" for w, h in (sight.sample.size, sight.view.resized, sight.view.size))
    return f"{original}, {'not resized' if original == resized else f'resized to {resized}'}, cut to {bucket}"


def _treatment(sight: Sight) -> str:
    left, top = sight.view.crop
    parts = [f"cut at {left}, {top}"]
    parts += ["mirrored"] if sight.view.flip else []
    parts += [str(sight.view.jitter)] if sight.view.jitter is not None else []
    parts += ["regularisation"] if sight.sample.subset.is_reg else []
    parts += [f"weight {sight.weight:g}"] if sight.weight != 1 else []
    if sight.mask is not None:
        parts.append(f"{sight.mask.mean().item():.0%} learnt")
    return ", ".join(parts)


def _whole(view: View) -> Image.Image:
    """The image as it is resized, with the cut drawn on it."""
    with open_image(view.path) as opened:
        image = to_rgb(opened)
    picture = image.resize(_fitting(view.resized), Image.Resampling.LANCZOS)
    scale = picture.width / view.resized[0], picture.height / view.resized[1]
    (left, top), (width, height) = view.crop, view.size
    box = (left * scale[0], top * scale[1], (left + width) * scale[0] - 1, (top + height) * scale[1] - 1)
    ImageDraw.Draw(picture).rectangle(box, outline=CUT, width=2)
    return picture


def _seen(sight: Sight) -> Image.Image:
    """The pixels that the network sees, with masked parts in pink."""
    pixels = (sight.pixels.permute(1, 2, 0).numpy() + 1) * 127.5
    if sight.mask is not None:
        hidden = 0.7 * (1 - sight.mask.permute(1, 2, 0).numpy())
        pixels = pixels * (1 - hidden) + MASKED * hidden
    image = Image.fromarray(pixels.round().astype(np.uint8))
    small = max(image.size) < BOX  # its pixels are meant to be seen
    return image.resize(_fitting(image.size), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def _fitting(size: Size) -> Size:
    """The size with its longest side as long as a box."""
    scale = BOX / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
