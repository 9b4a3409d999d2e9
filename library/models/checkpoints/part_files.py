"""The parts of a model that lie in folders of their own, or in files that options name: text encoders, VAEs and others.

Shared by the families that are trained by flow matching. A family declares its parts as `PartFiles`; no weight is read
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from library.errors import UserError
from library.files.index import read_index
from library.files.json_text import Config
from library.files.scaled_fp8 import with_scales
from library.files.tensors import TensorEntry
from library.models.checkpoints.base_model import BaseModel, Part, read_json
from library.models.checkpoints.checkpoint import strip
from library.models.checkpoints.detect import kind_of_file
from library.models.checkpoints.folder import entries_in
from library.models.checkpoints.open_file import locate

Entries = Mapping[str, TensorEntry]


def as_they_are(entries: Entries, config: Config) -> Entries:
    """The names of a folder whose weights have the module's own."""
    return entries


@dataclass(frozen=True, kw_only=True)
class PartFiles:
    """How one part lies on disk.

    folder: its folder in a diffusers folder. title: its name in messages, behind "the". in_folder: from the names in
    such a folder, and its configuration, to the module's own.
    Of parts that may have a file of their own, also noun: what such a file holds, in messages. marks: names of which it
    has one. prefixes: how all names may begin, the first that fits; "" fits always. read: the part in such a file, from
    its names without the prefix and its path. has_tokenizer: whether its folder may hold the tokenizer as well.
    """

    folder: str
    title: str
    in_folder: Callable[[Entries, Config], Entries] = as_they_are
    noun: str = ""
    marks: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    read: Callable[[Entries, str], Part] | None = None
    has_tokenizer: bool = False

    def in_its_folder(self, folder: Path) -> Part:
        """The part in a folder as diffusers writes one."""
        config = read_json(folder / "config.json")
        return Part(config, f"the {self.title} in {folder}", lambda: self.in_folder(entries_in(folder), config))


def parts_in(folder: Path, kinds: Mapping[str, PartFiles]) -> dict[str, Part]:
    """Those that a diffusers folder has. The denoiser, which the others cannot do without, has to be there."""
    return {
        name: kind.in_its_folder(folder / kind.folder)
        for name, kind in kinds.items()
        if name == "denoiser" or (folder / kind.folder).is_dir()
    }


def without_prefix(entries: Entries, prefixes: Iterable[str]) -> dict[str, TensorEntry]:
    """The entries under the first of these prefixes that there is, without it."""
    return next((found for prefix in prefixes if (found := strip(entries, prefix))), {})


def with_part(base: BaseModel, name: str, kind: PartFiles, path: str, *, option: str) -> BaseModel:
    """The model with one of its parts from a file or folder of its own. Raises UserError."""
    try:
        location = locate(path)
        made = _own_folder(kind, location) if location.is_dir() else _own_file(kind, location, path)
        made.entries()
    except UserError as error:
        raise UserError(f"--{option} {error}") from None
    tokenizer = tokenizer_in(location) if kind.has_tokenizer and location.is_dir() else None
    return replace(base, parts={**base.parts, name: made}, tokenizer=tokenizer or base.tokenizer)


def _own_folder(kind: PartFiles, location: Path) -> Part:
    return kind.in_its_folder(location if (location / "config.json").is_file() else location / kind.folder)


def _own_file(kind: PartFiles, location: Path, path: str) -> Part:
    index = read_index(location)
    entries = without_prefix(index.entries, kind.prefixes)
    if not any(mark in entries for mark in kind.marks):
        raise UserError(f"{path} is {kind_of_file(index).title}, and not {kind.noun}")
    assert kind.read is not None, f"the {kind.title} has no files of its own"
    return kind.read(with_scales(path, entries), path)


def tokenizer_in(folder: Path) -> Path | None:
    """A folder with a tokenizer, or None: with a tokenizer.json, or with vocab.json and merges.txt."""
    if (folder / "tokenizer.json").is_file():
        return folder
    return folder if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() else None


def own_tokenizer(path: str, *, option: str, inside: str) -> Path:
    """The folder with the tokenizer that an option names, itself or its folder `inside`. UserError if there is none."""
    location = Path(path).expanduser()
    location = location.parent if location.is_file() else location
    for folder in (location, location / inside):
        if found := tokenizer_in(folder):
            return found
    raise UserError(f"--{option} {path}: there is no tokenizer.json in it, nor vocab.json with merges.txt")
