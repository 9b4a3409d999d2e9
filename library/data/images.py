"""Image files → pixels: open, turn upright, resize, crop, flip."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, features

from library.data.samples import Size
from library.errors import UserError

with contextlib.suppress(ImportError):
    import pillow_jxl  # type: ignore[import-not-found]  # noqa: F401  it registers JPEG XL with Pillow

# Pillow only warns between one and two times its limit; `open_image` refuses both, with a message of its own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Image generators write their whole workflow into a PNG: Pillow's 1 MB would cost such an image its place.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

Image.init()
# By content, not by name: a WebP called .png is common. Not every format of Pillow: some start other programs (EPS).
_READ = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JXL")
_FORMATS: list[str] = [name for name in _READ if name in Image.OPEN]
_FULL_SCALES = {"I": (65535.0, 2.0**31 - 1), "F": (1.0, 255.0, 65535.0, 2.0**31 - 1)}
_UPRIGHT = {  # value of the EXIF tag Orientation → what turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@functools.cache
def image_extensions() -> frozenset[str]:
    """The extensions that make a file an image, in lower case: kohya's, as far as this Pillow reads them."""
    known = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    registered = Image.registered_extensions()
    known |= {".avif"} if ".avif" in registered and features.check("avif") else set()
    known |= {".jxl"} if ".jxl" in registered else set()
    return frozenset(known)


@dataclass(frozen=True)
class View:
    """An image as the network sees it: resized, then cut to `size` at `crop` (left, top), then perhaps mirrored."""

    path: Path
    resized: Size
    crop: tuple[int, int]
    size: Size
    flip: bool

    @property
    def offset(self) -> tuple[int, int]:
        """(left, top) of what is seen in the resized image, which is mirrored too where `flip` is set."""
        left, top = self.crop
        return (self.resized[0] - self.size[0] - left if self.flip else left), top


def open_image(path: Path) -> ImageFile.ImageFile:
    """The opened, not yet decoded image. Raises UserError for a decompression bomb, what Pillow raises for the rest."""
    limit = Image.MAX_IMAGE_PIXELS
    too_large = UserError(f"more than {limit} pixels (a decompression bomb?): make it smaller")
    try:
        image = Image.open(path, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise too_large from error
    if limit is not None and image.width * image.height > limit:
        image.close()
        raise too_large
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a decoded image: 1 is upright, from 5 on width and height are exchanged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises anything on a broken EXIF block, which costs nobody a pixel
        return 1
    return value if value in _UPRIGHT else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB from any mode; the first frame of several; transparent parts become white.

    White, because what lies hidden under the alpha channel is noise, and most cut-out pictures were drawn on white.
    """
    image.load()
    if (turn := _UPRIGHT.get(orientation(image))) is not None:
        image = image.transpose(turn)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _gray_to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _gray_to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit by 1/257. "I" and "F" do not say what is white: the least usual full scale that holds the brightest."""
    values = np.asarray(image, np.float32)
    if not np.isfinite(values).all():
        raise ValueError("some of its pixels are no numbers")
    scales = _FULL_SCALES.get(image.mode, (65535.0,))
    brightest = values.max()
    white = next((scale for scale in scales if brightest <= scale), scales[-1])
    gray = np.clip(values * (255 / white), 0, 255).round().astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        gray[values == transparent] = 255
    return Image.fromarray(gray)


def _average_rows(pixels: np.ndarray, rows: int) -> np.ndarray:
    """[H, W, C] → float32 [rows, W, C], rows ≤ H: each the mean over its exact share of the old rows, parts included.

    Pillow's BOX takes whole rows only: at 600 → 512 px it differs from this by 27 of 255 grey levels in the mean on
    noise, 1.7 on a smooth picture; OpenCV's INTER_AREA (kohya's) by its rounding, at most 0.5.
    """
    height = pixels.shape[0]
    scale = height / rows
    start = np.arange(rows) * scale
    first = start.astype(np.int64)
    mean = np.zeros((rows, *pixels.shape[1:]), np.float32)
    for k in range(math.ceil(scale) + 1):
        row = first + k
        overlap = np.clip(np.minimum(start + scale, row + 1) - np.maximum(start, row), 0, None)
        mean += pixels[np.minimum(row, height - 1)] * (overlap / scale).astype(np.float32)[:, None, None]
    return mean


def resize(image: Image.Image, size: Size) -> np.ndarray:
    """RGB image → [H, W, 3] in 0 … 255, with kohya's filters: area where nothing grows, else Lanczos."""
    if image.size == size:
        return np.asarray(image)
    if image.width < size[0] or image.height < size[1]:
        return np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    tall = _average_rows(np.asarray(image), size[1])
    return _average_rows(np.ascontiguousarray(tall.transpose(1, 0, 2)), size[0]).transpose(1, 0, 2)


def load_pixels(view: View) -> torch.Tensor:
    """The view as float32 [3, H, W] in [-1, 1]. Raises UserError where the file cannot be read any more."""
    try:
        with open_image(view.path) as opened:
            image = to_rgb(opened)
    except Exception as error:  # decoders raise anything on a broken file
        raise UserError(f"{view.path}: {error}") from error
    left, top = view.crop
    width, height = view.size
    pixels = resize(image, view.resized)[top : top + height, left : left + width]
    if view.flip:
        pixels = pixels[:, ::-1]
    chw = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(chw).div_(127.5).sub_(1.0).clamp_(-1, 1)  # the means are rounded
