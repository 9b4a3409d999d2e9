"""Every image is decoded once before training: a file that cannot be read is found now, not at night."""

from __future__ import annotations

import hashlib
import logging
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import UnidentifiedImageError
from PIL.Image import Image

from library.cpus import thread_count
from library.data.images import open_image, orientation, to_rgb
from library.data.quality.look import Look, halvings, look_at
from library.data.samples import Size
from library.errors import UserError, why_not
from library.progress import bar

logger = logging.getLogger(__name__)
_SHOWN = 20


@dataclass(frozen=True)
class Measured:
    """An image's size, upright, and whether parts of it may be transparent. `content`: a hash of its pixels, the same
    for every copy, whatever else its file says; "" if it was not computed."""

    size: Size
    transparent: bool
    animated: bool
    look: Look = field(compare=False, repr=False)
    content: str = ""


def check_images(paths: Iterable[Path], *, contents: bool = False) -> tuple[dict[Path, Measured], dict[Path, str]]:
    """Decode every image. Returns the measures of the good ones, and the reason why each bad one cannot be read.

    With `contents` JPEGs are decoded at their full size, which takes longer.
    """
    distinct = list(dict.fromkeys(paths))
    good: dict[Path, Measured] = {}
    bad: dict[Path, str] = {}
    animated: list[Path] = []
    with ThreadPoolExecutor(thread_count()) as pool:  # decoding releases the GIL
        results = bar(
            pool.map(partial(_measure, contents=contents), distinct),
            desc="checking images",
            total=len(distinct),
            unit="img",
        )
        for path, result in zip(distinct, results, strict=True):
            if isinstance(result, str):
                bad[path] = result
                continue
            good[path] = result
            if result.animated:
                animated.append(path)
    if animated:
        logger.warning("%d animated images: the first frame of each is used (%s …)", len(animated), animated[0])
    return good, bad


def report_bad_images(bad: dict[Path, str], *, skip: bool) -> None:
    """One UserError that lists the unreadable images; with `skip` one warning that counts them."""
    if not bad:
        return
    lines = [f"  {path}: {reason}" for path, reason in list(bad.items())[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    listed = "\n".join(lines)
    if skip:
        logger.warning("%d unreadable images are left out (--skip_bad_images):\n%s", len(bad), listed)
        return
    raise UserError(f"{len(bad)} unreadable images (--skip_bad_images leaves them out):\n{listed}")


def _measure(path: Path, *, contents: bool) -> Measured | str:
    """The facts about an image that decodes to the end, else the reason why it does not."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "not a file"
        if status.st_size == 0:
            return "the file is empty"
        with open_image(path) as image:
            size = image.size
            # phones' MPO holds a preview as its second picture: no animation
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
            if not contents:  # a JPEG is read to its end but decoded no larger than its looks need, which is faster
                smaller = 2 ** halvings(size)
                image.draft(None, (max(1, size[0] // smaller), max(1, size[1] // smaller)))
            pixels = to_rgb(image)
            transparent = image.has_transparency_data
            if orientation(image) >= 5:
                size = size[1], size[0]
        look = look_at(pixels, full_size=size)
        return Measured(size, transparent, animated, look, _content(pixels) if contents else "")
    except UnidentifiedImageError:
        return f"not an image, it begins with {_head(path)!r}"
    except OSError as error:  # decoders raise it as well, without a number
        return why_not(error) if error.errno else str(error)
    except Exception as error:  # decoders raise anything on a broken file
        return str(error) or type(error).__name__


def _content(pixels: Image) -> str:
    return hashlib.blake2b(repr(pixels.size).encode() + pixels.tobytes(), digest_size=16).hexdigest()


def _head(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(24).decode("ascii", errors="replace")
