"""A folder of images with a caption file beside each, as kohya's DreamBooth data sets have it."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.captions import refuse_long_caption
from library.data.images import image_extensions
from library.data.samples import UNMEASURED, Sample, Scan, SubsetSummary, warn_of
from library.errors import UserError, is_utf8, nearest_path, told_apart, why_not
from library.paths import composed
from library.progress import bar

if TYPE_CHECKING:
    from library.config.data.dataset_config import SubsetSpec

_USUAL_EXTENSIONS = (".txt", ".caption")  # of caption files
_KNOWN_EXTENSIONS = (*_USUAL_EXTENSIONS, ".captions", ".cap", ".tag", ".tags", ".json")  # that captioning tools write
_OTHER_IMAGES = frozenset((".gif", ".tif", ".tiff", ".jfif", ".heic", ".heif", ".avif", ".jxl", ".jp2"))


@dataclass(frozen=True)
class _Caption:
    """The caption of an image; `file` is None where there is none. `more_lines`: some are left out."""

    file: str | None
    text: str
    more_lines: bool


def scan(spec: SubsetSpec, index: int, faults: dict[Path, str] | None = None) -> Scan:
    """The samples of a subset, sorted by file name and not yet measured. Sub-folders are not searched, as in kohya.

    An image without a caption file takes `class_tokens` as its caption. With `enable_wildcard` all lines of a caption
    are kept that are not empty, otherwise the first. Raises UserError where the folder is missing or holds no images,
    or where captions lie there under another extension than the one asked for, if that can be an oversight; and where
    a caption cannot be read, unless there is `faults`, which then gets the file and the reason.
    """
    folder = _Folder(spec)
    extension = "." + spec.caption_extension.lstrip(".")
    files = {name: folder.caption_file(name, extension) for name in folder.images}
    unread = "" if any(files.values()) or spec.sentences else _captions_not_read(spec, extension, folder)
    pairs = bar(files.items(), desc="captions", total=len(files), disable=len(files) < 5000)
    captions = {name: _read_caption(spec, file, faults) for name, file in pairs}
    if spec.sentences:
        captions = dict.fromkeys(captions, _Caption("", "\n".join(spec.sentences), False))

    stems = Counter(_key(Path(name).stem) for name in folder.images)
    missing = [name for name, caption in captions.items() if caption.file is None]
    empty = [caption.file for caption in captions.values() if caption.file and not caption.text]
    several = [caption.file for caption in captions.values() if caption.file and caption.more_lines]
    shared = [name for name in folder.images if stems[_key(Path(name).stem)] > 1]
    instead = f"their caption is '{spec.class_tokens}'" if spec.class_tokens else "their caption is empty"
    findings = (
        (missing, f"images have no {extension} file: {instead}{unread}"),
        (empty, "caption files are empty, or their first line is"),
        (several, "caption files have more than one line: only the first is used"),
        (shared, "images share their name, and so their caption file, with another image"),
        (folder.other_images, "files of other image formats are left out"),
        (folder.subfolders, "sub-folders with images are not searched"),
    )
    warn_of(spec.image_dir, findings)

    samples = [
        Sample(
            *(spec.image_dir / name, f"{index}/{name}", caption.text, spec, UNMEASURED, spec.num_repeats),
            captioned=caption.file is not None,
        )
        for name, caption in captions.items()
    ]
    summary = SubsetSummary(
        subset=spec,
        images=len(samples),
        captions_found=len(samples) - len(missing),
        captions_missing=len(missing),
        captions_empty=len(empty),
        captions_of_several_lines=len(several),
        shared_names=len(shared),
        other_image_files=len(folder.other_images),
        subfolders_with_images=len(folder.subfolders),
    )
    return Scan(samples, summary)


def balance_regularisation(samples: Sequence[Sample]) -> list[Sample]:
    """Give the regularisation images of a data set as many repeats in all as the others have, as kohya does.

    In order, each comes with its own repeats until there are enough, and the rest is not used; if there are too few,
    they are repeated further in turn.
    """
    train = [sample for sample in samples if not sample.subset.is_reg]
    wanted = sum(sample.repeats for sample in train)
    used: list[Sample] = []
    count = 0
    for sample in samples:
        if sample.subset.is_reg and count < wanted:
            used.append(sample)
            count += sample.repeats
    if not used:
        return train
    each, more = divmod(max(0, wanted - count), len(used))
    return train + [replace(sample, repeats=sample.repeats + each + (i < more)) for i, sample in enumerate(used)]


class _Folder:
    """The names in a subset's folder, sorted, without hidden ones: macOS keeps "._a.png" beside "a.png"."""

    def __init__(self, spec: SubsetSpec) -> None:
        self.path = spec.image_dir
        if not os.path.isdir(self.path):
            raise UserError(f"{spec.origin}: no such folder: {self.path}{nearest_path(self.path)}")
        try:
            entries = sorted(_visible(self.path), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{spec.origin}: {self.path}: {why_not(error)}") from error
        if odd := [entry.name for entry in entries if not is_utf8(entry.name)]:
            raise UserError(f"{spec.origin}: {self.path}: the name {odd[0]!r} is not UTF-8: rename it")
        self.images = [entry.name for entry in entries if _is_image(entry)]
        # one level only, because links may form a loop
        folders = [entry for entry in entries if os.path.isdir(entry) and os.access(entry, os.R_OK | os.X_OK)]
        self.subfolders = [entry.name for entry in folders if any(map(_is_image, _visible(entry)))]
        if not self.images:
            hint = f"; its sub-folder '{self.subfolders[0]}' does, but is not searched" if self.subfolders else ""
            extensions = ", ".join(sorted(image_extensions()))
            raise UserError(f"{spec.origin}: {self.path} holds no images ({extensions}){hint}")
        self._files = {entry.name for entry in entries} - set(self.images)
        self.other_images = sorted(name for name in self._files if Path(name).suffix.lower() in _OTHER_IMAGES)
        self._by_key: dict[str, list[str]] = {}
        for name in sorted(self._files):
            self._by_key.setdefault(_key(name), []).append(name)

    def caption_file(self, image: str, extension: str) -> str | None:
        """ "a.txt" for "a.png"; as in kohya also for "a_120_80_64_64.png", where a face detector has cut its box."""
        stem = Path(image).stem
        found = self._find(stem + extension)
        name, *box = stem.rsplit("_", 4)
        if found is None and len(box) == 4 and all(part.isdecimal() for part in box):
            found = self._find(name + extension)
        return found

    def _find(self, name: str) -> str | None:
        """The file of this name, or else of one that Windows or macOS take for the same: in other letter case, or with
        accents stored in another way."""
        if name in self._files:
            return name
        near = self._by_key.get(_key(name), [])
        if len(near) > 1:
            raise UserError(f"{self.path}: '{name}' could be {' or '.join(told_apart(near))}: keep one of them")
        return near[0] if near else None


def _key(name: str) -> str:
    return composed(name).lower()


def _visible(folder: os.PathLike[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether the name is an image's. A broken link counts, so that it is reported as unreadable, not ignored."""
    return Path(entry.name).suffix.lower() in image_extensions() and not os.path.isdir(entry)


def _read_caption(spec: SubsetSpec, name: str | None, faults: dict[Path, str] | None) -> _Caption:
    if name is None:
        return _Caption(None, spec.class_tokens or "", False)
    path = spec.image_dir / name
    try:
        text = _text_of(path)
    except UserError as error:
        if faults is None:
            raise
        faults[path] = str(error).removeprefix(f"{path}: ")
        return _Caption(None, "", False)
    lines = [line.strip() for line in text.split("\n")]
    if spec.enable_wildcard:
        return _Caption(name, "\n".join(filter(None, lines)), False)
    return _Caption(name, lines[0], any(lines[1:]))


def _text_of(path: Path) -> str:
    """The text of a caption file. Raises UserError, which begins with the path, if it cannot be read."""
    try:
        refuse_long_caption(path.stat().st_size, str(path))
        if not path.is_file() and not path.is_dir():  # reading a pipe would block
            raise UserError(f"{path}: it is neither a file nor a folder")
        with path.open(encoding="utf-8-sig") as file:  # Windows editors put a byte order mark in front
            text = file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}): save it in that encoding") from error
    except OSError as error:
        raise UserError(f"{path}: {why_not(error)}") from error
    if "\0" in text:  # which UTF-8 lets pass
        raise UserError(f"{path}: it holds null characters: UTF-16? Save it as UTF-8")
    return text


def _captions_not_read(spec: SubsetSpec, extension: str, folder: _Folder) -> str:
    """A note on caption files beside the images that have another extension than the given one; "" for none.

    Kohya's default is .caption while nearly all captions are .txt, so runs are easily trained without captions by
    mistake. Therefore an extension that captions can have, or nearly so, is an error. One that captions never have is
    accepted: it is the only way to use the folder's name as the caption of images that have caption files.
    """
    for other in _USUAL_EXTENSIONS:
        beside = sum(folder.caption_file(image, other) is not None for image in folder.images)
        if beside and _like_a_captions(extension):
            raise UserError(
                f"{spec.origin}: {spec.image_dir}: none of {len(folder.images)} images has a {extension} file, "
                f"but {beside} have a {other} file: give --caption_extension {other} "
                f'(in a dataset config caption_extension = "{other}"), or .none to train without them'
            )
        if beside:
            return f"; {beside} {other} files lie beside them and are not read"
    return ""


def _like_a_captions(extension: str) -> bool:
    """Whether caption files have this extension, or one that differs by a typing mistake."""
    word = extension.lower()[1:]
    return any(
        word[:1] == known[1] and abs(len(word) + 1 - len(known)) <= 1 and difflib.get_close_matches(word, [known[1:]])
        for known in _KNOWN_EXTENSIONS
    )
