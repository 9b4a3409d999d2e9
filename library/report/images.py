"""Pictures as part of a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError


def data_url(path: Path, *, side: int) -> str | None:
    """The picture, at most `side` pixels wide and high, as a WebP in a `data:` URL; None if it cannot be read."""
    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (2 * side, 2 * side))  # JPEGs decode to a smaller size much faster
            image = ImageOps.exif_transpose(opened).convert("RGBA")
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            flat = Image.new("RGB", image.size, "white")
            flat.paste(image, mask=image.getchannel("A"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    buffer = io.BytesIO()
    flat.save(buffer, format="WEBP", quality=78, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
