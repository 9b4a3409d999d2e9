"""Encode once, keep on disk: files of earlier runs or other processes are read, the rest is encoded.

The files lie in a folder `.lora_cache` beside the images, or all in the folder of --cache_dir. It can be deleted at any
time. Reading goes to the files each time and relies on the system's page cache, so memory holds none of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from library.cpus import thread_count
from library.data.caches import files as cache_files
from library.data.caches.files import BrokenEntry
from library.data.caches.keys import caption_key, file_digest, files_of, view_key
from library.data.caches.memory import encoded_captions, encoded_images
from library.data.caches.rows import stacked
from library.data.images import load_pixels
from library.data.views import View
from library.errors import UserError
from library.progress import bar

logger = logging.getLogger(__name__)

FOLDER = ".lora_cache"
_OLD = 3600.0  # seconds after which a file half written counts as abandoned

Item = TypeVar("Item")
Result = TypeVar("Result")


class Gather(Protocol):
    """From a list in each process to the lists of all, joined."""

    def __call__(self, mine: list[Item], /) -> list[Item]: ...


def _alone(mine: list[Item], /) -> list[Item]:
    return mine


@dataclass(frozen=True)
class Team:
    """The processes of a run. `gather` gives each the lists of all, joined, and waits for all."""

    rank: int = 0
    size: int = 1
    gather: Gather = _alone

    def share(self, items: Iterable[Item]) -> list[Item]:
        """This process's part of a list that is the same, or of the same order, in all of them."""
        return list(items)[self.rank :: self.size]

    def map(self, work: Callable[[Item], Result], items: Sequence[Item], *, desc: str, unit: str) -> list[Result]:
        """work(item) for each item, shared out among the processes and their threads."""
        mine = self.share(range(len(items)))
        with ThreadPoolExecutor(thread_count()) as pool:
            results = bar(pool.map(lambda i: work(items[i]), mine), desc=desc, total=len(mine), unit=unit)
            numbered = self.gather(list(zip(mine, results, strict=True)))
        return [result for _, result in sorted(numbered, key=lambda pair: pair[0])]


@dataclass(frozen=True, kw_only=True)
class Disk:
    """How one kind of results is stored on disk.

    encoder: identifies everything that the results depend on beside the image or the caption. folder: one place for
    all; None is a folder beside each image. trust: do not check existing files before they are needed.
    """

    encoder: str
    folder: Path | None = None
    trust: bool = False
    team: Team = field(default_factory=Team)

    def place(self, beside: Path, kind: str) -> Path:
        return (self.folder or beside / FOLDER) / kind


@dataclass(frozen=True)
class Found:
    """The state of a cache: bytes by file, missing files, and the reasons why others cannot be used."""

    sizes: dict[Path, int]
    missing: set[Path]
    broken: dict[Path, str]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())


class _OnDisk(Generic[Item]):
    def __init__(self, files: Mapping[Item, Path]) -> None:
        self._files = files

    def _read(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Name → [B, …]. The checksum of every file is checked each time."""
        entries = []
        for item in items:
            path = self._files[item]
            try:
                entries.append(cache_files.read(path))
            except (BrokenEntry, OSError) as error:
                raise UserError(
                    f"the cache file {path} cannot be used: {error}. Start again, without --skip_cache_check: "
                    "missing and broken files are encoded anew"
                ) from error
        return {name: stacked([entry[name] for entry in entries]) for name in entries[0]}


class DiskLatents(_OnDisk[View]):
    """As `cache.LatentCache`, on disk."""

    def get(self, views: Sequence[View]) -> tuple[Tensor, Tensor]:
        """(mean, std), each [B, C, h, w], of views of one size."""
        moments = self._read(views)
        return moments["mean"], moments["std"]


class DiskTexts(_OnDisk[str]):
    """As `cache.TextCache`, on disk."""

    def get(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Name → [B, …]."""
        return self._read(captions)


def latent_files(views: Iterable[View], disk: Disk) -> tuple[dict[View, Path], dict[Path, str]]:
    """Where the latents of each view belong, and the hash of every image file. Reads all images' bytes."""
    distinct = list(dict.fromkeys(views))
    paths = list(dict.fromkeys(path for view in distinct for path in files_of(view)))
    hashed = disk.team.map(file_digest, paths, desc="hashing images", unit="img")
    digests = dict(zip(paths, hashed, strict=True))
    files = {
        view: _file(disk.place(view.path.parent, "latents"), view_key(view, digests=digests, encoder=disk.encoder))
        for view in distinct
    }
    return files, digests


def caption_files(captions: Mapping[str, Path], disk: Disk) -> dict[str, Path]:
    """Where the text encoders' output for each caption belongs. `captions`: the folder of an image that has it."""
    return {
        caption: _file(disk.place(folder, "texts"), caption_key(caption, encoder=disk.encoder))
        for caption, folder in captions.items()
    }


def _file(folder: Path, key: str) -> Path:
    return folder / f"{key}{cache_files.ENDING}"


def look(files: Iterable[Path], disk: Disk) -> Found:
    """The state of the cache. Reads and checks every file, unless it is trusted; the processes share this work."""
    paths = list(dict.fromkeys(files))
    states = disk.team.map(partial(_state, trust=disk.trust), paths, desc="checking the cache", unit="file")
    pairs = list(zip(paths, states, strict=True))
    return Found(
        sizes={path: state for path, state in pairs if isinstance(state, int)},
        missing={path for path, state in pairs if not isinstance(state, int)},
        broken={path: state for path, state in pairs if isinstance(state, str)},
    )


def _state(path: Path, *, trust: bool) -> int | str | None:
    """The size of a good file, None for a missing one, else what is wrong with it."""
    try:
        size = path.stat().st_size
        if not trust:
            cache_files.read(path)
        return size
    except FileNotFoundError:
        return None
    except (BrokenEntry, OSError) as error:
        return str(error)


@torch.no_grad()
def cache_images(
    views: Iterable[View],
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    batch_size: int,
    disk: Disk,
    used_too: Iterable[View] = (),
) -> DiskLatents:
    """As `cache.encode_images`, but only of images that are not on disk. `encode` is not called if all are.

    `used_too`: further views of this run, cached by another call.
    """
    files, digests = latent_files(views, disk)
    others, _ = latent_files(used_too, disk)

    def load(view: View) -> Tensor:
        pixels = load_pixels(view)
        for path in files_of(view):
            if file_digest(path) != digests[path]:  # its latents would lie under the old contents' name
                raise UserError(f"{path} was changed while it was being encoded: start again")
        return pixels

    def encode_and_write(todo: Sequence[View]) -> None:
        for batch, mean, std in encoded_images(todo, encode, batch_size=batch_size, load=load):
            for view, mean_CHW, std_CHW in zip(batch, mean.cpu(), std.cpu(), strict=True):
                cache_files.write(files[view], {"mean": mean_CHW, "std": std_CHW})

    _complete(files, encode_and_write, disk, what="latents", items="images", used_too=others.values())
    return DiskLatents(files)


@torch.no_grad()
def cache_captions(
    captions: Mapping[str, Path],
    encode: Callable[[list[str]], dict[str, Tensor]],
    *,
    batch_size: int,
    disk: Disk,
    used_too: Mapping[str, Path] | None = None,
) -> DiskTexts:
    """As `cache.encode_captions`, but only of captions that are not on disk. `encode` is not called if all are.

    `used_too`: further captions of this run, cached by another call.
    """
    files = caption_files(captions, disk)
    others = caption_files(used_too or {}, disk)

    def encode_and_write(todo: Sequence[str]) -> None:
        for batch, outputs in encoded_captions(todo, encode, batch_size=batch_size):
            on_cpu = {name: output.cpu() for name, output in outputs.items()}
            for row, caption in enumerate(batch):
                cache_files.write(files[caption], {name: output[row] for name, output in on_cpu.items()})

    _complete(files, encode_and_write, disk, what="text encoder outputs", items="captions", used_too=others.values())
    return DiskTexts(files)


def _complete(
    files: Mapping[Item, Path],
    encode_and_write: Callable[[list[Item]], None],
    disk: Disk,
    *,
    what: str,
    items: str,
    used_too: Collection[Path],
) -> None:
    """Complete the cache: each process of the team encodes its share of the missing files. Logs the result."""
    found = look(files.values(), disk)
    for path, reason in list(found.broken.items())[:5]:
        logger.warning("the cache file %s is not used and will be replaced: %s", path, reason)
    if len(found.broken) > 5:
        logger.warning("%d more cache files are broken and will be replaced", len(found.broken) - 5)
    for folder in {path.parent for path in found.missing}:
        cache_files.make_folder(folder)
    wanted: dict[Path, Item] = {}  # copies of one image have one file
    for item, path in files.items():
        wanted.setdefault(path, item)
    todo = [item for path, item in wanted.items() if path in found.missing]
    if mine := disk.team.share(todo):
        encode_and_write(mine)
    disk.team.gather([])
    # another machine of the team may have looked at, and written to, a disk of its own
    if elsewhere := [item for path, item in wanted.items() if not path.exists()]:
        encode_and_write(elsewhere)
    written = sum(files[item].stat().st_size for item in todo)
    places = list(dict.fromkeys(path.parent for path in files.values()))
    logger.info(
        "%s on disk: %d read (%s), %d encoded (%s), for %d %s, in %s",
        what,
        len(found.sizes),
        _megabytes(found.nbytes),
        len(todo),
        _megabytes(written),
        len(wanted),
        items,
        f"{places[0]} and {len(places) - 1} more folders" if len(places) > 1 else places[0],
    )
    if disk.team.rank == 0:
        for folder in places:
            _tidy(folder, {*wanted, *used_too})


def _tidy(folder: Path, used: Collection[Path]) -> None:
    """Remove files that killed runs left half written; log those that this run does not use."""
    others = [path for path in folder.glob(f"*{cache_files.ENDING}") if path not in used]
    for path in folder.glob(f".*{cache_files.PART}"):
        try:
            if time.time() - path.stat().st_mtime > _OLD:
                path.unlink()
        except OSError:  # another run has just finished or removed it
            continue
    if others:
        size = sum(path.stat().st_size for path in others)
        logger.info(
            "%s also holds %s (%s) of other images, captions, sizes or models; if no run needs them, delete it",
            folder,
            "one file" if len(others) == 1 else f"{len(others)} files",
            _megabytes(size),
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
