"""One small file for each cached result: named by a hash of its inputs, written atomically, checked when it is read.

A file is safetensors with a checksum in its header over its own name and every other byte. So a file that is cut off,
damaged, or renamed is recognised. Nothing waits for the disk (fsync): after a power cut such a file is made again.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from library.errors import UserError

ENDING = ".safetensors"
PART = ".part"
"""The ending of files that are being written."""

_UNKNOWN = b"0" * 32
_CHECKSUM = re.compile(rb'"blake2b":"([0-9a-f]{32})"')


class BrokenEntry(Exception):
    """The file exists and does not contain what was written; the message says why."""


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that holds these tensors."""
    return len(packed("", tensors))


def packed(key: str, tensors: Mapping[str, Tensor]) -> bytes:
    """The contents of the file `key`.safetensors."""
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # safetensors refuses shared memory
    data = save(own, {"blake2b": _UNKNOWN.decode()})
    return data.replace(_UNKNOWN, _checksum(key, data).encode(), 1)


def unpacked(key: str, data: bytes) -> dict[str, Tensor]:
    """Unpack the tensors that `packed` was given. Raises BrokenEntry."""
    if not data:
        raise BrokenEntry("it is empty")
    header_end = 8 + int.from_bytes(data[:8], "little")
    found = _CHECKSUM.search(data, 0, min(header_end, len(data)))
    if found is None:
        raise BrokenEntry("its header is damaged")
    begin, end = found.span(1)
    if _checksum(key, data[:begin], _UNKNOWN, memoryview(data)[end:]) != found[1].decode():
        raise BrokenEntry("it is cut off or damaged: its checksum is wrong")
    try:
        return load(data)
    except SafetensorError as error:  # written so by another program
        raise BrokenEntry(str(error)) from error


def _checksum(key: str, *parts: bytes | memoryview) -> str:
    digest = hashlib.blake2b(key.encode(), digest_size=len(_UNKNOWN) // 2)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of an entry. Raises BrokenEntry, FileNotFoundError or another OSError."""
    return unpacked(path.stem, path.read_bytes())


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an entry beside and rename it, so that no one ever sees half of it. Raises UserError."""
    # a unique name: another run may be writing the same entry
    beside = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{PART}")
    try:
        with beside.open("xb") as file:
            file.write(packed(path.stem, tensors))
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"cannot write the cache file {path}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder for entries. Raises UserError with a remedy if the images' folder is read-only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write in it")
    except OSError as error:
        raise UserError(
            f"cannot keep a cache in {folder}: {error.strerror or error}. Give another place with --cache_dir"
        ) from error
