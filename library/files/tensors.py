"""The position of each tensor in a weights file, found without reading any weight.

A weights file, whatever its format, becomes a table from names to `TensorEntry`: a byte position, an element type and
a shape. Nothing here imports torch, so that a wrong file is refused at once.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

from library.errors import UserError

ITEM_SIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
SAFETENSORS_NAMES = {name: code for code, name in _SAFETENSORS_DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file.

    file: the file that holds it. offset: byte position of its first element. dtype: torch's name ("float16").
    stride: in elements, or None where the elements lie one after another in the order of `shape`. halves_exchanged: the
    tensor is the one in the file with the two halves of its first axis exchanged. scale: the one number in a file that
    the elements are to be multiplied by, or None.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    halves_exchanged: bool = False
    scale: TensorEntry | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without gaps between strides."""
        return self.count * ITEM_SIZE[self.dtype]

    @property
    def extent(self) -> int:
        """Number of elements from the first to the last, with gaps between strides."""
        if self.stride is None or not self.count:
            return self.count
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def rows(self, part: int, parts: int, *, count: int = 1) -> TensorEntry:
        """Of `parts` equal slices along the first axis `count`, from the part-th on."""
        if not self.shape or self.shape[0] % parts:
            raise UserError(f"{self.file}: a tensor of shape {list(self.shape)} cannot be {parts} equal ones")
        rows = self.shape[0] // parts
        step = self.stride[0] if self.stride else math.prod(self.shape[1:])
        offset = self.offset + part * rows * step * ITEM_SIZE[self.dtype]
        return replace(self, offset=offset, shape=(count * rows, *self.shape[1:]))

    def exchanged(self) -> TensorEntry:
        """The same with the two halves of its rows exchanged."""
        if not self.shape or self.shape[0] % 2 or self.stride is not None:
            raise UserError(f"{self.file}: a tensor of shape {list(self.shape)} has no halves to exchange")
        return replace(self, halves_exchanged=not self.halves_exchanged)

    def transposed(self) -> TensorEntry:
        """The same matrix with its axes exchanged."""
        if len(self.shape) != 2:
            raise UserError(f"{self.file}: a tensor of shape {list(self.shape)} where a matrix is expected")
        rows, columns = self.stride or (self.shape[1], 1)
        return replace(self, shape=self.shape[::-1], stride=(columns, rows))


@dataclass(frozen=True)
class WeightsIndex:
    """The tensors of a file by name, and the file's metadata."""

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_safetensors_index(path: Path, size: int) -> WeightsIndex:
    """Parse the header (format: 8 bytes length, JSON, data) and check every position against the file's size."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_MAX_HEADER, size - 8):
            raise UserError(f"{path}: cut off or damaged: its header takes {length} bytes and the file has {size}")
        text = file.read(length)
    try:
        header: object = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path}: neither a .safetensors nor a torch checkpoint, or damaged at its start")
    metadata = header.pop("__metadata__", None)
    metadata = metadata if isinstance(metadata, dict) else {}
    data = 8 + length
    entries = {name: _safetensors_entry(path, name, value, data=data, size=size) for name, value in header.items()}
    return WeightsIndex(path, entries, {str(key): str(value) for key, value in metadata.items()})


def _safetensors_entry(path: Path, name: str, value: object, *, data: int, size: int) -> TensorEntry:
    said = value if isinstance(value, dict) else {}
    dtype, shape, place = said.get("dtype"), said.get("shape"), said.get("data_offsets")
    if not (isinstance(dtype, str) and _are_naturals(shape) and _are_naturals(place) and len(place) == 2):
        raise UserError(f"{path}: damaged: the header's entry for '{name}' is {str(value)[:200]}")
    begin, end = place
    if dtype not in _SAFETENSORS_DTYPES:
        raise UserError(f"{path}: '{name}' has the element type {dtype}, which is not supported")
    entry = TensorEntry(path, data + begin, _SAFETENSORS_DTYPES[dtype], tuple(shape))
    if entry.nbytes != end - begin:
        raise UserError(
            f"{path}: damaged: '{name}' of shape {list(shape)} needs {entry.nbytes} bytes, not {end - begin}"
        )
    if data + end > size:
        raise UserError(
            f"{path}: cut off: '{name}' ends at byte {data + end}, the file has {size}: copy or download it again"
        )
    return entry


def _are_naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
