"""A hash of one part of a base model: of its weights and configuration, not of the file's name or place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from library.errors import UserError
from library.files.tensors import ITEM_SIZE, TensorEntry
from library.models.checkpoints.base_model import Part

_BLOCK = 1 << 20


def part_fingerprint(part: Part) -> str:
    """32 hexadecimal digits over the configuration and every weight; reads the part once, at over 1 GB/s."""
    # "_diffusers_version" and the like say who wrote the file
    config = {key: value for key, value in part.config.items() if not key.startswith("_")}
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing and reading release the GIL
        entries = part.entries()
        names = sorted(entries)
        digests = dict(zip(names, pool.map(_tensor_digest, (entries[name] for name in names)), strict=True))
    return combined({"config": config, "weights": digests})


def folder_fingerprint(folder: Path) -> str:
    """Over the names and contents of a folder's files: of a tokenizer's."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return combined({path.name: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in files})


def combined(values: Mapping[str, object]) -> str:
    """One hash of several plain values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _tensor_digest(entry: TensorEntry) -> str:
    digest = hashlib.blake2b(f"{entry.dtype} {entry.shape} {entry.stride}".encode(), digest_size=16)
    extent = entry.count
    if entry.stride is not None and entry.count:
        extent = 1 + sum((n - 1) * step for n, step in zip(entry.shape, entry.stride, strict=True))
    left = extent * ITEM_SIZE[entry.dtype]
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        while left:
            block = file.read(min(left, _BLOCK))
            if not block:
                raise UserError(f"{entry.file}: ended while it was being read")
            digest.update(block)
            left -= len(block)
    if entry.scale is not None:
        digest.update(_tensor_digest(entry.scale).encode())
    return digest.hexdigest()
