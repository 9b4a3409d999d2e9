"""The table of a weights file, whatever its format."""

from __future__ import annotations

import os
from pathlib import Path

from library.errors import UserError, nearest_path, why_not
from library.files.pickles import read_pickle_index
from library.files.tensors import WeightsIndex, read_safetensors_index


def read_index(path: Path) -> WeightsIndex:
    """The table of a .safetensors, .ckpt, .pt or .bin file. The content decides the format, not the file's name.

    Raises UserError if the file is none of them or is cut off.
    """
    if not os.path.isfile(path):  # reading a pipe would block
        raise UserError(f"{path}: no such file{nearest_path(path)}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {why_not(error)}") from None
    if start[8:9] == b"{":  # the header's length comes first, whose bytes may look like the beginning of anything
        return read_safetensors_index(path, size)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return read_pickle_index(path)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer of {size} bytes, not the weights; fetch them with `git lfs pull`")
    if start.lstrip()[:1] == b"<":
        raise UserError(f"{path}: a web page, not weights; the download went wrong")
    raise UserError(f"{path}: neither a .safetensors nor a torch checkpoint ({size} bytes)")
