"""Writing a weights file again with some of its weights changed, one tensor at a time.

The new file has the names, element types and shapes of the old one. A change is found by its place in the old file,
so no name has to be turned back: query, key and value of open_clip are three changes to one tensor. At no time is more
than one tensor in memory in fp32, and of one that is changed by rows only those that fit a cache; in the file's type
there are the few that wait to be written.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from library.errors import UserError
from library.files.tensors import ITEM_SIZE, SAFETENSORS_NAMES, TensorEntry, WeightsIndex
from library.models.checkpoints.weights import Change, read_bytes, read_extent
from library.progress import bar

SPEC_HASH = "modelspec.hash_sha256"  # of the bytes after the header, as 0x…
_BUFFER = 1 << 24  # bytes of a tensor without a change that are copied at a time
_AHEAD = 3  # pieces that wait to be written
_ROWS = 1 << 18  # elements of a block of rows, 1 MiB in fp32: read, changed, checked and rounded while it is in a cache
_FLUSH = 1 << 26  # bytes after which the system is asked to begin moving them to the disk


RowChange = Callable[[Tensor, int], None]
"""Changes some rows of a weight, [k, n] in fp32, in place. The number is that of the first of them."""


@dataclass(frozen=True)
class Patch:
    """A change to a weight: its place in a file, its shape in the module, and the function from the weight to the new
    one, both in fp32. The function may write into the weight that it gets.

    by_rows: prepares the same change for rows of the weight, whose other axes are flattened, where it acts on each row
    by itself; None where it does not.
    """

    entry: TensorEntry
    shape: tuple[int, ...]
    change: Change
    by_rows: Callable[[], RowChange] | None = None


def rewrite(target: Path, index: WeightsIndex, patches: Sequence[Patch], metadata: Mapping[str, str]) -> None:
    """Write the tensors of `index` with these changes to `target`, a .safetensors file, and wait for nothing.

    Sums are rounded once to the tensor's type. `metadata`: of the new file; where it has `SPEC_HASH`, the true one is
    put in its place. Raises `UserError`, naming the tensor, for a result that is not finite in the tensor's type.
    """
    names = sorted(index.entries, key=lambda name: (-ITEM_SIZE[index.entries[name].dtype], index.entries[name].offset))
    about = {**metadata, **({SPEC_HASH: _spec_hash("0" * 64)} if SPEC_HASH in metadata else {})}
    header, digest = _header(index, names, about), hashlib.sha256() if SPEC_HASH in metadata else None
    with index.path.open("rb", buffering=0) as source, target.open("wb") as file:
        file.write(header)
        within = _Patches(patches)
        with _Writer(file, digest) as writer:
            for name in bar(names, desc=f"writing {target.name.removeprefix('.')}", unit="tensor"):
                for piece in _bytes_of(source, name, index.entries[name], within):
                    writer.put(piece)
        if digest is not None:
            file.seek(0)
            file.write(_header(index, names, {**about, SPEC_HASH: _spec_hash(digest.hexdigest())}))


class _Writer:
    """Writes pieces in their order, in a thread of its own: while a sum is formed, the one before is hashed and moved
    to the disk. A context, which ends when all is written. Errors of writing are raised by a later `put`, or its end.
    """

    def __init__(self, file: BinaryIO, digest: hashlib._Hash | None) -> None:
        self._file, self._digest = file, digest
        self._thread, self._waiting = ThreadPoolExecutor(1), deque[Future[None]]()
        self._flushed, self._written = 0, file.tell()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        while kind is None and self._waiting:
            self._waiting.popleft().result()

    def put(self, piece: memoryview) -> None:
        """The piece must not change any more. Waits while `_AHEAD` others do."""
        self._waiting.append(self._thread.submit(self._write, piece))
        if len(self._waiting) > _AHEAD:
            self._waiting.popleft().result()

    def _write(self, piece: memoryview) -> None:
        self._file.write(piece)
        self._written += len(piece)
        if self._digest is not None:
            self._digest.update(piece)
        if self._written - self._flushed >= _FLUSH and hasattr(os, "posix_fadvise"):
            self._file.flush()
            # Linux begins to write what is said not to be needed, and does not wait for it
            os.posix_fadvise(self._file.fileno(), self._flushed, self._written - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = self._written


def _spec_hash(digits: str) -> str:
    return f"0x{digits}"


def _header(index: WeightsIndex, names: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        entry = index.entries[name]
        begin, end = end, end + entry.nbytes
        table[name] = {
            "dtype": SAFETENSORS_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return len(text).to_bytes(8, "little") + text


class _Patches:
    """Changes to one file, by place."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self._patches = sorted(patches, key=lambda patch: patch.entry.offset)
        self._offsets = [patch.entry.offset for patch in self._patches]

    def inside(self, entry: TensorEntry) -> list[Patch]:
        """The changes to this tensor."""
        end = entry.offset + entry.extent * ITEM_SIZE[entry.dtype]
        return self._patches[bisect_left(self._offsets, entry.offset) : bisect_left(self._offsets, end)]


def _bytes_of(source: BinaryIO, name: str, entry: TensorEntry, patches: _Patches) -> Iterator[memoryview]:
    """The elements of a tensor in the order of its shape, in pieces."""
    changes = patches.inside(entry)
    if not changes and entry.stride is None:
        source.seek(entry.offset)
        left = entry.nbytes
        while left:
            piece = torch.empty(min(left, _BUFFER), dtype=torch.uint8)
            read_bytes(source, piece, entry.file)
            yield piece.numpy().data
            left -= len(piece)
        return
    whole = read_extent(source, entry)
    for patch in changes:
        place = _view(whole, patch.entry, (patch.entry.offset - entry.offset) // ITEM_SIZE[entry.dtype])
        if patch.entry.halves_exchanged:
            half = len(place) // 2
            place.copy_(_changed(name, place.roll(half, 0), patch).view(place.shape).roll(half, 0))
        elif patch.by_rows is not None:
            _change_rows(name, place, patch, patch.by_rows())
        else:
            place.copy_(_changed(name, place, patch).view(place.shape))
    yield _view(whole, entry, 0).contiguous().view(-1).view(torch.uint8).numpy().data


def _view(whole: Tensor, entry: TensorEntry, start: int) -> Tensor:
    """The elements of `entry` in `whole`, which has those of its tensor from the first to the last."""
    stride = entry.stride or torch.empty(entry.shape, device="meta").stride()
    return whole.as_strided(entry.shape, stride, start)


@torch.no_grad()
def _changed(name: str, place: Tensor, patch: Patch) -> Tensor:
    """The new weight in the tensor's type."""
    weight = place.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    changed = patch.change(weight.reshape(patch.shape))
    rounded = changed.to(place.dtype)
    if not _holds(rounded, changed):
        raise _refusal(name, place, changed, patch)
    return rounded


@torch.no_grad()
def _change_rows(name: str, place: Tensor, patch: Patch, change: RowChange) -> None:
    """Write the new weight into its place, block by block: the sum in fp32 never leaves the cache."""
    length = max(1, place.numel() // max(1, len(place)))
    count = max(1, _ROWS // length)
    block = torch.empty(min(count, len(place)), length)
    for start in range(0, len(place), count):
        rows = place[start : start + count]
        weight = block[: len(rows)]
        weight.view(rows.shape).copy_(rows)
        change(weight, start)
        rounded = weight.view(rows.shape).to(rows.dtype)
        if not _holds(rounded, weight):
            raise _refusal(name, place, weight, patch)
        rows.copy_(rounded)


def _refusal(name: str, place: Tensor, changed: Tensor, patch: Patch) -> UserError:
    """The error for a new weight, or rows of it, that the tensor's type does not hold."""
    kind = str(place.dtype).removeprefix("torch.")
    where, most = f"{patch.entry.file}: '{name}'", float(changed.abs().max())
    if not place.float().isfinite().all():
        return UserError(f"{where} holds NaN or infinity already")
    if not changed.isfinite().all():
        return UserError(f"{where} would hold NaN or infinity: the LoRA's tensors do, or are too large")
    return UserError(f"{where} would have values up to {most:g}, which {kind} does not hold; lower the weights")


def _holds(rounded: Tensor, changed: Tensor) -> bool:
    """Whether the tensor's type holds all elements, and they are numbers."""
    if rounded.element_size() == 1:  # float8 has no infinity to see: torch rounds to the largest value
        return bool(changed.abs().max() <= torch.finfo(rounded.dtype).max)
    if not rounded.numel():
        return True
    low, high = rounded.aminmax()  # NaN if an element is; one pass, without a tensor of truths
    return bool(low.isfinite()) and bool(high.isfinite())
