"""Image files → pixels: open, turn upright, resize, crop, flip."""

from __future__ import annotations

import contextlib
import functools
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, features

from library.data.color import apply_jitter
from library.data.resize import resize
from library.data.views import View
from library.errors import UserError

with contextlib.suppress(ImportError):
    import pillow_jxl  # noqa: F401  it registers JPEG XL with Pillow

# Pillow only warns between one and two times its limit; `open_image` refuses both, with a message of its own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Image generators write their whole workflow into a PNG: with Pillow's limit of 1 MB such an image could not be read.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

Image.init()
# By content, not by name: a WebP called .png is common. Not every format of Pillow: some start other programs (EPS).
_READ = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JXL")
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


def open_image(path: Path) -> ImageFile.ImageFile:
    """The opened, not yet decoded image. Raises UserError for a decompression bomb, else whatever Pillow raises."""
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
    """The EXIF orientation of a decoded image: 1 is upright, from 5 on width and height are exchanged.

    JPEG XL has its own beside it, by which its decoder turns the pixels, but not those of a JPEG that is kept within.
    """
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises anything on a broken EXIF block; the pixels are good all the same
        return 1
    return value if value in _UPRIGHT else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB from any mode; the first frame of several; transparent parts become white.

    White, because what lies hidden under the alpha channel is noise, and most cut-out pictures were drawn on white.
    """
    return _on_white(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """Decoded, turned as its EXIF block says, and of 8 bits a channel."""
    image.load()
    if (turn := _UPRIGHT.get(orientation(image))) is not None:
        image = image.transpose(turn)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _gray_to_8_bit(image)
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _without_alpha(image: Image.Image) -> Image.Image:
    """The colours as they are stored, hidden ones too."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _gray_to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit by 1/257. "I" and "F" have no defined white: the smallest usual full scale that holds the brightest."""
    values = np.asarray(image, np.float32)
    if not np.isfinite(values).all():
        raise ValueError("some of its pixels are NaN")
    scales = _FULL_SCALES.get(image.mode, (65535.0,))
    brightest = values.max()
    white = next((scale for scale in scales if brightest <= scale), scales[-1])
    gray = np.clip(values * (255 / white), 0, 255).round().astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        gray[values == transparent] = 255
    return Image.fromarray(gray)


def _alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel of an upright image, 8 bits; None where it has none."""
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def load_pixels(view: View) -> torch.Tensor:
    """The view as float32 [3, H, W] in [-1, 1]. Raises UserError if the file can no longer be read."""
    return _pixels(view, _decode(view.path))


def load_mask(view: View) -> torch.Tensor:
    """The mask of the view, float32 [1, H, W] in 0 … 1; 1 where there is none. Raises UserError as `load_pixels`."""
    return _mask(view, _decode(view.path) if view.alpha_mask else None)


def load_view(view: View) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pixels and, if the view is masked, its mask; the image is decoded once."""
    image = _decode(view.path)
    return _pixels(view, image), _mask(view, image) if view.masked else None


def _decode(path: Path) -> Image.Image:
    """Upright, 8 bits, with its alpha channel."""
    try:
        with open_image(path) as opened:
            return upright(opened)
    except Exception as error:  # decoders raise anything on a broken file
        raise UserError(f"{path}: {error}") from error


def _pixels(view: View, image: Image.Image) -> torch.Tensor:
    # A mask in the alpha channel does not change the colours: white in masked parts would be learnt at its edges.
    rgb = _without_alpha(image) if view.alpha_mask else _on_white(image)
    pixels = _cut(resize(rgb, view.resized, view.interpolation), view)
    if view.jitter is not None:
        pixels = apply_jitter(pixels, view.jitter)
    chw = np.ascontiguousarray(_turned(pixels, view).transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(chw).div_(127.5).sub_(1.0).clamp_(-1, 1)  # the means are rounded


def _mask(view: View, image: Image.Image | None) -> torch.Tensor:
    """`image`: the decoded image, needed for its alpha channel only."""
    if view.mask is not None:
        weights: Image.Image | None = _without_alpha(_decode(view.mask)).getchannel("R")  # as in kohya
    else:
        weights = _alpha(image) if image is not None and view.alpha_mask else None
    if weights is None:
        return torch.ones(1, view.size[1], view.size[0])
    cut = _turned(_cut(resize(weights, view.resized, view.interpolation), view), view)
    return torch.from_numpy(np.ascontiguousarray(cut, dtype=np.float32))[None].div_(255).clamp_(0, 1)


def _cut(pixels: np.ndarray, view: View) -> np.ndarray:
    (left, top), (width, height) = view.crop, view.size
    return pixels[top : top + height, left : left + width]


def _turned(pixels: np.ndarray, view: View) -> np.ndarray:
    return pixels[:, ::-1] if view.flip else pixels
