"""Folders of images as users give them: `train_data_dir/10_name` means 10 repeats of each image per epoch, as kohya's
users lay them out; other options take NAME=FOLDER."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError, is_utf8, nearest_path, why_not
from library.paths import on_disk

logger = logging.getLogger(__name__)

# Only for better advice in a message: `library.data.images` decides which files are images.
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_NAME = re.compile(r"(?P<repeats>\d+)(?:_(?P<name>.*))?", re.DOTALL)


@dataclass(frozen=True)
class ImageFolder:
    """A folder, its repeats, and the caption for images without one (the folder's name behind the number)."""

    path: Path
    num_repeats: int
    class_tokens: str


def find_image_folders(directory: str, *, where: str) -> list[ImageFolder]:
    """The folders in `directory` whose names begin with a number of repeats, sorted by name.

    Others are left out with a warning. Raises UserError if none is left.
    """
    root = on_disk(Path(directory))
    if not os.path.isdir(root):
        raise UserError(f"{where}: no such folder: {root}{nearest_path(root)}")
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise UserError(f"{where}: {root}: {why_not(error)}") from None
    found: list[ImageFolder] = []
    for path in (path for path in entries if os.path.isdir(path) and not path.name.startswith(".")):
        if not is_utf8(path.name):
            raise UserError(f"{where}: {root}: the name {path.name!r} is not UTF-8: rename it")
        match = _NAME.fullmatch(path.name)
        if match is None:
            logger.warning("%s: folder '%s' is left out: its name does not begin like 10_", where, path.name)
        elif int(match["repeats"]) == 0:
            logger.warning("%s: folder '%s' is left out: it asks for 0 repeats", where, path.name)
        else:
            found.append(ImageFolder(path, int(match["repeats"]), match["name"] or ""))
    if not found:
        raise UserError(f"{where}: {root} has no folder named like 10_name (10 repeats of each image){_advice(root)}")
    return found


def _advice(root: Path) -> str:
    entries = sorted(root.iterdir())
    images = [path for path in entries if path.suffix.lower() in _IMAGE_ENDINGS]
    folders = [path.name for path in entries if path.is_dir() and not path.name.startswith(".")]
    if images and _NAME.fullmatch(root.name):
        return f"; it is such a folder itself: give the folder that holds it, {root.parent}"
    if images:
        return f"; images ({len(images)}) lie directly in it: put them into {root / '10_name'}"
    if folders:
        return f"; rename its folders, for example {folders[0]} to 10_{folders[0]}"
    return "; it is empty" if not entries else ""


@dataclass(frozen=True)
class NamedFolder:
    """NAME=FOLDER: a folder, by the name that tables and curves have for it. `place` begins messages about it."""

    name: str
    path: Path
    place: str


def named_folders(words: Sequence[str], *, option: str) -> list[NamedFolder]:
    """The folders of `--option`, each NAME=FOLDER, or FOLDER, whose own name it then has. Raises UserError for one that
    does not exist, and for an empty name."""
    found = []
    for word in words:
        place = f"--{option} {word}"
        name, equals, path = word.partition("=")
        folder = on_disk(Path(path) if equals and not Path(word).is_dir() else Path(word))
        if not folder.is_dir():
            raise UserError(f"{place}: no such folder: {folder}{nearest_path(folder)}")
        own = name.strip() if equals and folder != on_disk(Path(word)) else folder.resolve().name
        if not own:
            raise UserError(f"{place}: the name before = is empty")
        found.append(NamedFolder(own, folder, place))
    return found


def refuse_twins(folders: Iterable[NamedFolder]) -> None:
    """Raises UserError for two folders of one name."""
    seen: dict[str, NamedFolder] = {}
    for one in folders:
        if (other := seen.setdefault(one.name, one)) is not one:
            raise UserError(f"two folders are called {one.name}: {other.path} and {one.path}; give NAME=FOLDER")
