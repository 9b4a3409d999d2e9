"""A weights file written again with changes: by place, in each element type, from each layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.files.header import read_metadata
from library.files.index import read_index
from library.models.checkpoints import rewrite as rewriting
from library.models.checkpoints.rewrite import SPEC_HASH, Patch, _Writer, rewrite


def _add_1(weight: Tensor) -> Tensor:
    assert weight.dtype == torch.float32
    return weight + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_each_type_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(6.0).view(2, 3)
    other = {"n": torch.arange(3), "flag": torch.tensor([True]), "empty": torch.zeros(0), "half": torch.ones(5).half()}
    save_file({"w": values.to(dtype), **other}, tmp_path / "a.safetensors")
    index = read_index(tmp_path / "a.safetensors")
    rewrite(tmp_path / "b.safetensors", index, [Patch(index.entries["w"], (2, 3), _add_1)], {"x": "ä"})
    found = load_file(tmp_path / "b.safetensors")
    assert found["w"].dtype == dtype
    assert torch.equal(found["w"].float(), (values + 1).to(dtype).float())
    for name, tensor in other.items():
        assert torch.equal(found[name], tensor)
    assert read_metadata(tmp_path / "b.safetensors") == {"x": "ä"}


def test_a_third_and_a_transposed_tensor_change_in_place(tmp_path: Path) -> None:
    """As open_clip has query, key and value, and its projection: the shape of a change is the module's."""
    save_file({"qkv": torch.zeros(6, 2), "turned": torch.arange(6.0).view(2, 3)}, tmp_path / "a.safetensors")
    index = read_index(tmp_path / "a.safetensors")
    rows = Patch(index.entries["qkv"].rows(1, 3), (2, 2), _add_1)
    first_row = torch.tensor([[10.0, 10.0], [0, 0], [0, 0]])
    turned = Patch(index.entries["turned"].transposed(), (3, 2), lambda weight: weight + first_row)
    rewrite(tmp_path / "b.safetensors", index, [turned, rows], {})
    found = load_file(tmp_path / "b.safetensors")
    assert found["qkv"].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1], [0, 0], [0, 0]]
    assert found["turned"].tolist() == [[10, 1, 2], [13, 4, 5]]


@pytest.mark.parametrize("block", [1, 6, 9, 1 << 18])
def test_a_change_by_rows_is_the_change_of_the_whole(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of a row, of two, of one and a remainder, of all; of convolutions, of a third and a transposed one."""
    monkeypatch.setattr(rewriting, "_ROWS", block)
    tensors = {
        "conv": torch.arange(30.0).view(5, 3, 2, 1).half(),
        "qkv": torch.arange(18.0).view(6, 3).bfloat16(),
        "turned": torch.arange(15.0).view(3, 5),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    entries = (index := read_index(tmp_path / "a.safetensors")).entries
    places = {
        entries["conv"]: (5, 3, 2, 1),
        entries["qkv"].rows(1, 3): (2, 3),
        entries["turned"].transposed(): (5, 3),
    }
    results = []
    for by_rows in (None, lambda: _add_place):
        patches = [Patch(entry, shape, _add_places, by_rows) for entry, shape in places.items()]
        rewrite(tmp_path / "b.safetensors", index, patches, {})
        results.append(load_file(tmp_path / "b.safetensors"))
    for name in tensors:
        assert torch.equal(results[0][name], results[1][name])
        assert not torch.equal(results[1][name], tensors[name])


def _add_place(rows: Tensor, start: int) -> None:
    """To each element 10 times its row and its place in that."""
    rows += 10 * torch.arange(start, start + len(rows))[:, None] + torch.arange(rows.shape[1])


def _add_places(weight: Tensor) -> Tensor:
    rows = weight.reshape(len(weight), -1).clone()
    _add_place(rows, 0)
    return rows.view(weight.shape)


def test_a_row_that_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "_ROWS", 2)
    save_file({"w": torch.tensor([[1.0, 2], [3, 4]]).half()}, tmp_path / "a.safetensors")
    index = read_index(tmp_path / "a.safetensors")

    def grow(rows: Tensor, start: int) -> None:
        rows *= 1 + start * 1e5

    patch = Patch(index.entries["w"], (2, 2), _add_1, lambda: grow)
    with pytest.raises(UserError, match=r"'w' would have values up to 400004, which float16"):
        rewrite(tmp_path / "b.safetensors", index, [patch], {})


def test_a_pickle_with_strides_becomes_contiguous(tmp_path: Path) -> None:
    """Two names of one storage both get the change, as both are that weight."""
    turned = torch.arange(6.0).view(2, 3).T
    torch.save({"state_dict": {"a": turned, "tied": turned, "slice": torch.arange(8.0)[::2]}}, tmp_path / "a.ckpt")
    index = read_index(tmp_path / "a.ckpt")
    rewrite(tmp_path / "b.safetensors", index, [Patch(index.entries["a"], (3, 2), _add_1)], {})
    found = load_file(tmp_path / "b.safetensors")
    assert torch.equal(found["a"], turned + 1)
    assert torch.equal(found["tied"], turned + 1)
    assert torch.equal(found["slice"], torch.arange(8.0)[::2])


@pytest.mark.parametrize(
    ("weight", "change", "said"),
    [
        (torch.ones(2).half(), lambda weight: weight * 1e5, r"'w' would have values up to 100000, which float16"),
        (torch.ones(2).to(torch.float8_e4m3fn), lambda weight: weight * 1e3, r"which float8_e4m3fn does not hold"),
        (torch.ones(2), lambda weight: weight / 0, r"'w' would hold NaN or infinity"),
        (torch.tensor([1.0, float("nan")]), _add_1, r"'w' holds NaN or infinity already"),
        (torch.tensor([float("inf"), -float("inf")]), _add_1, r"'w' holds NaN or infinity already"),
    ],
)
def test_what_is_not_finite_is_named(weight: Tensor, change, said: str, tmp_path: Path) -> None:
    save_file({"w": weight}, tmp_path / "a.safetensors")
    index = read_index(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=said):
        rewrite(tmp_path / "b.safetensors", index, [Patch(index.entries["w"], (2,), change)], {})


def test_what_the_disk_refuses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though another thread writes: of the first piece, and of the last."""
    save_file({name: torch.ones(4) for name in "abcdefgh"}, tmp_path / "a.safetensors")
    index = read_index(tmp_path / "a.safetensors")
    for refused in (0, 7):
        seen = iter(range(8))

        def write(self: _Writer, piece: memoryview, refused: int = refused, seen: Iterator[int] = seen) -> None:
            if next(seen) == refused:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(_Writer, "_write", write)
        with pytest.raises(OSError, match="No space left"):
            rewrite(tmp_path / "b.safetensors", index, [], {})


def test_a_copied_tensor_of_several_pieces_has_its_bytes_and_its_hash(tmp_path: Path) -> None:
    """More than wait to be written, each with other content: no piece is used again too early."""
    count = 5 * (1 << 24) // 4 + 3
    save_file({"large": torch.arange(count, dtype=torch.int32), "w": torch.ones(2)}, tmp_path / "a.safetensors")
    index = read_index(tmp_path / "a.safetensors")
    rewrite(tmp_path / "b.safetensors", index, [Patch(index.entries["w"], (2,), _add_1)], {SPEC_HASH: ""})
    found = load_file(tmp_path / "b.safetensors")
    assert torch.equal(found["large"], torch.arange(count, dtype=torch.int32))
    assert found["w"].tolist() == [2, 2]
    content = (tmp_path / "b.safetensors").read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert read_metadata(tmp_path / "b.safetensors")[SPEC_HASH] == f"0x{hashlib.sha256(tensors).hexdigest()}"
