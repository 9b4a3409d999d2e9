"""Headers of .safetensors files: what is believed, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.files.index import read_index
from library.files.tensors import TensorEntry


def _write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_positions_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    states = {"a": torch.randn(3, 4), "b": torch.randn(2, 2, 2, 2).half(), "c": torch.tensor(5)}
    path = tmp_path / "x.safetensors"
    save_file(states, path, metadata={"modelspec.title": "t"})
    index, raw = read_index(path), path.read_bytes()
    assert index.metadata == {"modelspec.title": "t"}
    assert index.entries.keys() == states.keys()
    for name, entry in index.entries.items():
        dtype = getattr(torch, entry.dtype)
        values = torch.frombuffer(bytearray(raw[entry.offset : entry.offset + entry.nbytes]), dtype=dtype)
        assert torch.equal(values.view(entry.shape), states[name])


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": _entry([4], 0, 16)}, b"\0" * 15, "cut off: 'w' ends at byte"),
        ({"w": _entry([4], 0, 12)}, b"\0" * 16, "needs 16 bytes, not 12"),
        ({"w": _entry([1 << 40], 0, 1 << 42)}, b"", "cut off"),
        ({"w": _entry([-4], 0, -16)}, b"", "damaged"),
        ({"w": {"dtype": "F32"}}, b"", "damaged"),
        ({"w": 3}, b"", "damaged"),
        ({"w": _entry([2], 0, 1, "F4")}, b"\0", "element type F4"),
        ([1, 2], b"", "neither a .safetensors nor a torch checkpoint"),
    ],
)
def test_a_header_that_claims_too_much_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = _write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(UserError, match=message) as caught:
        read_index(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither a .safetensors nor a torch checkpoint"),
        (b"hello", "neither a .safetensors nor a torch checkpoint"),
        (b"\n<!DOCTYPE html><html>" + b" " * 80, "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 4\n", "Git LFS pointer"),
        (struct.pack("<Q", 5000) + b"{}", "cut off"),
        (struct.pack("<Q", 1 << 60) + b"{}" * 50, "cut off or damaged"),
        (struct.pack("<Q", 4) + b"{\xfe\x00\x01" + b"\0" * 80, "damaged at its start"),
    ],
)
def test_what_is_no_weights_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_index(path)


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.ckpt")
    torch.save({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert read_index(tmp_path / "x.ckpt").entries.keys() == {"a"}
    assert read_index(tmp_path / "x.safetensors").entries.keys() == {"a"}


@pytest.mark.parametrize("length", [ord("<"), 0x0280, 0x4B50])
def test_a_header_length_may_look_like_the_start_of_something_else(tmp_path: Path, length: int) -> None:
    """ "<" of a web page, b"\\x80\\x02" of a pickle, "PK" of a zip archive."""
    text = json.dumps({"w": _entry([1], 0, 4)}).encode().ljust(length)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", max(length, len(text))) + text + b"\0" * 4)
    assert read_index(path).entries.keys() == {"w"}


def test_rows_are_equal_slices() -> None:
    whole = TensorEntry(Path("x"), 100, "float16", (6, 5))
    assert [whole.rows(i, 3).offset for i in range(3)] == [100, 120, 140]
    assert whole.rows(1, 3).shape == (2, 5)
    transposed = TensorEntry(Path("x"), 100, "float16", (6, 5), (1, 6))
    assert transposed.rows(2, 3).offset == 108
    with pytest.raises(UserError, match="cannot be 3 equal ones"):
        TensorEntry(Path("x"), 0, "float32", (4, 5)).rows(0, 3)
