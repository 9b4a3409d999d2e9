"""The names of cached files, made from everything that a result depends on: image, caption, size, encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.views import View
from library.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

VERSION = 2
"""Increase it whenever the same file, view or caption gives other numbers than before: older entries become unused."""

_BLOCK = 1 << 20


def file_digest(path: Path) -> str:
    """The hash of a file's bytes, at over 1 GB/s. Time and size are not enough: they can be equal for other contents.

    Raises UserError.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    return digest.hexdigest()


def files_of(view: DataclassInstance) -> Iterator[Path]:
    """The files that a view is made from."""
    for field in fields(view):
        value = getattr(view, field.name)
        if isinstance(value, Path):
            yield value
        elif is_dataclass(value) and not isinstance(value, type):
            yield from files_of(value)


def view_key(view: View, *, digests: Mapping[Path, str], encoder: str) -> str:
    """All that the latents of a view depend on: every field of it, files by their contents."""

    def plain(value: object) -> object:
        if isinstance(value, Path):
            return digests[value]
        assert is_dataclass(value), "a view contains only JSON values, paths and its own parts"
        return {field.name: getattr(value, field.name) for field in fields(value)}

    return _key({"latents": plain(view), "encoder": encoder, "version": VERSION}, default=plain)


def caption_key(caption: str, *, encoder: str) -> str:
    return _key({"caption": caption, "encoder": encoder, "version": VERSION})


def _key(parts: Mapping[str, object], default: Callable[[object], object] | None = None) -> str:
    text = json.dumps(parts, default=default, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
