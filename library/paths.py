"""Names of files in two forms of Unicode, which look alike: "é" as one character, or as "e" and an accent.

macOS stores names decomposed (NFD) on some disks, and files that come from there keep that form on Linux and Windows,
where "é.png" typed composed (NFC) is another name. Users mean the same file by both.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from library.errors import UserError, told_apart


def composed(name: str) -> str:
    """The name in composed form (NFC): equal for all that look alike."""
    return unicodedata.normalize("NFC", name)


def on_disk(path: Path) -> Path:
    """The path with its names as they are on the disk, if they differ only in the form of Unicode.

    `path` itself if it exists, or if no such name exists. UserError if two names match.
    """
    if os.path.exists(path) or path.parent == path:
        return path
    parent = on_disk(path.parent)
    try:
        with os.scandir(parent) as entries:
            found = sorted(entry.name for entry in entries if composed(entry.name) == composed(path.name))
    except (OSError, ValueError):
        found = []
    if len(found) > 1:
        raise UserError(f"{path}: could be {' or '.join(told_apart(found))}: keep one of them")
    return parent / found[0] if found else path
