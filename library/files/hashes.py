"""The hashes by which other programs recognise a model or a LoRA, as kohya's scripts write them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path

from library.errors import why_not
from library.progress import bar

logger = logging.getLogger(__name__)


def model_metadata(part: str, given: str) -> dict[str, str]:
    """Name and hashes of the base model (`part` "sd_model") or a VAE ("vae"); folders and hub ids have no hash."""
    path = Path(given)
    if not path.exists():
        return {f"ss_{part}_name": given}
    if path.is_dir():
        return {f"ss_{part}_name": path.resolve().name}
    named = {f"ss_{part}_name": path.name}
    try:
        return {f"ss_{part}_hash": old_hash(path), f"ss_new_{part}_hash": sha256(path), **named}
    except OSError as error:  # a drive that is gone by now: no reason to lose the trained network
        logger.warning("%s: the metadata has no hash of this file: %s", path, why_not(error))
        return named


def old_hash(path: Path) -> str:
    """The first web UI's hash of a model: 8 digits, over 64 KiB from the second MiB on."""
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def sha256(path: Path, *, start: int = 0) -> str:
    """The SHA-256 of a file from byte `start` on, in hexadecimal; large files show a bar."""
    mib = math.ceil((path.stat().st_size - start) / 2**20)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        blocks = iter(lambda: file.read(2**20), b"")
        for block in bar(blocks, desc=f"hash of {path.name}", total=mib, unit="MiB", disable=mib < 512):
            digest.update(block)
    return digest.hexdigest()


def safetensors_hashes(path: Path) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a safetensors file, read in blocks.

    They are defined over the file as it would be with its `ss_*` metadata only: the first is the SHA-256 of the bytes
    after the header, the second the old 8-digit hash of that whole file.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        kept = {key: value for key, value in header.pop("__metadata__", {}).items() if key.startswith("ss_")}
        text = json.dumps({"__metadata__": kept, **header}, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        block = head[0x100000:0x110000]
        file.seek(8 + size + 0x100000 + len(block) - len(head))
        block += file.read(0x10000 - len(block))
    return {
        "sshs_model_hash": sha256(path, start=8 + size),
        "sshs_legacy_hash": hashlib.sha256(block).hexdigest()[:8],
    }


# A file is written with these, then they are overwritten where they stand: no second copy on disk or in memory.
UNKNOWN_HASHES = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}


def write_hashes(path: Path) -> None:
    """Put the true hashes in the place of `UNKNOWN_HASHES` in a safetensors file's header.

    A value that a third-party network module has written itself is left alone, as is a file without one.
    """
    hashes = safetensors_hashes(path)
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        for key, unknown in UNKNOWN_HASHES.items():
            # a quoted key cannot occur inside a JSON string, where its quotes would be escaped
            header = header.replace(f'"{key}":"{unknown}"'.encode(), f'"{key}":"{hashes[key]}"'.encode())
        file.seek(8)
        file.write(header)
