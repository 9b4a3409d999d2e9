"""The metadata of a safetensors file, read without torch."""

from __future__ import annotations

import json
from pathlib import Path

_MOST_BYTES = 100_000_000  # of a header, the format's own limit


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file; empty for a file that is no safetensors or has none. Raises OSError."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MOST_BYTES:
            return {}
        try:
            header = json.loads(file.read(size))
        except (ValueError, RecursionError):
            return {}
    about = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return about if isinstance(about, dict) else {}
