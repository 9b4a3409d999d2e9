"""Two measures of an image's looks: a signature, nearly the same for pictures that look alike, and its blur."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from library.data.samples import Size

MEASURED_SIDE = 512  # pixels: images are halved while their shorter side stays at least so long
SIGNATURE_SIDE = 8
UNIT = 2**11  # so that all sums of a product of two signatures are whole numbers below 2 ** 24: exact in float32
FLAT = 2.0  # levels of 255: an image whose signature varies by less is of one colour, as far as signatures go
LINES = 128
REBLUR = 9  # pixels: the width of the mean in `blur_effect`, that of the paper


@dataclass(frozen=True, eq=False)
class Look:
    """`signature`: int16 [192], see `signature`. `blur` in 0 … 1: see `blur_effect`."""

    signature: np.ndarray
    blur: float


def look_at(image: Image.Image, *, full_size: Size) -> Look:
    """The looks of an upright RGB image. It may have been decoded smaller than its `full_size`, at least at the size of
    `halvings`."""
    factor = max(1, (2 ** halvings(full_size)) * min(image.size) // min(full_size))
    small = image.reduce(factor) if factor > 1 else image
    return Look(signature(small), blur_effect(np.asarray(small.convert("L"))))


def halvings(size: Size) -> int:
    """How often an image is halved before it is measured: its shorter side is then 512 … 1023 pixels, or its own."""
    return max(0, (min(size) // MEASURED_SIDE).bit_length() - 1)


def signature(image: Image.Image) -> np.ndarray:
    """int16 [192]: the image shrunk to 8 × 8 pixels in RGB, less their mean, as a vector of length `UNIT`. All 0 for an
    image of one colour.

    The product of two signatures, divided by `UNIT` squared, is the correlation of the two small pictures: changes of
    size, compression, brightness and contrast hardly matter to it, those of colours and shapes do. It consists of whole
    numbers, so it has the same bits everywhere.
    """
    shrunk = image.resize((SIGNATURE_SIDE, SIGNATURE_SIDE), Image.Resampling.BOX)
    values = np.asarray(shrunk, np.int64).ravel()
    deviations = len(values) * values - values.sum()
    length = math.sqrt(int((deviations**2).sum()))
    if length <= FLAT * len(values) ** 1.5:
        return np.zeros(len(values), np.int16)
    return np.rint(deviations * (UNIT / length)).astype(np.int16)


def blur_effect(gray: np.ndarray) -> float:
    """The blur of a grey image, uint8 [H, W], between 0 (sharp) and 1; 0 for one too small to be measured.

    F. Crete, T. Dolmiere, P. Ladret, M. Nicolas, "The blur effect: perception and estimation with a new no-reference
    perceptual blur metric", 2007: a mean over nine pixels takes much of the differences between neighbours from a sharp
    image and little from one that is blurred already. The result is the share that is left, along the rows or the
    columns, whichever is larger. It is computed on at least `LINES` of them, if there are so many, evenly spaced, and
    in whole numbers, so it has the same bits everywhere.
    """
    if min(gray.shape) < 2 * REBLUR:
        return 0.0
    height, width = gray.shape
    columns, rows = max(1, width // LINES), max(1, height // LINES)
    return max(_share_left(gray[:, ::columns], axis=0), _share_left(gray[::rows], axis=1))


def _share_left(gray: np.ndarray, *, axis: int) -> float:
    """The blur along one axis; 1 where neighbours never differ."""
    values = gray.astype(np.int16)  # nine times 255 fit
    length = values.shape[axis]

    def part(array: np.ndarray, start: int, stop: int) -> np.ndarray:
        return array[start:stop] if axis == 0 else array[:, start:stop]

    sums = values
    for width in (1, 2, 4):  # sums of two, four and eight neighbours
        sums = part(sums, 0, sums.shape[axis] - width) + part(sums, width, sums.shape[axis])
    sums = part(sums, 0, sums.shape[axis] - 1) + part(values, REBLUR - 1, length)  # of nine
    margin = REBLUR // 2
    before = REBLUR * np.abs(np.diff(part(values, margin, length - margin), axis=axis))
    after = np.abs(np.diff(sums, axis=axis))
    whole = int(before.sum(dtype=np.int64))
    return 1 - int(np.maximum(before - after, 0).sum(dtype=np.int64)) / whole if whole else 1.0
