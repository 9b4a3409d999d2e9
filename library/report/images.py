"""Pictures as part of a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from library.data.images import open_image, to_rgb


def data_url(path: Path, *, side: int) -> str | None:
    """The picture, at most `side` pixels wide and high, as a WebP in a `data:` URL; None if it cannot be read."""
    try:
        with open_image(path) as opened:
            opened.draft("RGB", (2 * side, 2 * side))  # JPEGs decode to a smaller size much faster
            image = to_rgb(opened)
    except Exception:  # decoders raise anything on a broken file
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=78, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
