"""A cached file is what was written, or says that it is not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from library.data.caches import files as cache_files
from library.data.caches.files import BrokenEntry, make_folder, read, size_of, write
from library.errors import UserError


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    path = tmp_path / f"{'ab' * 16}.safetensors"
    whole = torch.arange(48, dtype=torch.float32).reshape(2, 4, 6)
    write(path, {"mean": whole[1], "std": whole[1].T, "half": whole[0].bfloat16()})
    return path


def test_what_is_read_is_what_was_written(entry: Path, tmp_path: Path) -> None:
    tensors = read(entry)
    whole = torch.arange(48, dtype=torch.float32).reshape(2, 4, 6)
    assert tensors.keys() == {"mean", "std", "half"}
    assert torch.equal(tensors["mean"], whole[1])
    assert torch.equal(tensors["std"], whole[1].T)
    assert torch.equal(tensors["half"], whole[0].bfloat16())
    assert list(tmp_path.iterdir()) == [entry]
    assert entry.stat().st_size == size_of(tensors)


def test_every_wrong_byte_and_every_cut_is_noticed(entry: Path) -> None:
    data = entry.read_bytes()
    for i in range(len(data)):
        with pytest.raises(BrokenEntry):
            cache_files.unpacked(entry.stem, data[:i])
        with pytest.raises(BrokenEntry):
            cache_files.unpacked(entry.stem, data[:i] + bytes([data[i] ^ 16]) + data[i + 1 :])
    with pytest.raises(BrokenEntry):
        cache_files.unpacked(entry.stem, data + b"\0")


def test_a_renamed_file_is_noticed(entry: Path) -> None:
    other = entry.rename(entry.with_stem("cd" * 16))
    with pytest.raises(BrokenEntry):
        read(other)


def test_many_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "key.safetensors"
    failed: list[Exception] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            try:
                read(path)
            except FileNotFoundError:
                continue
            except Exception as error:
                failed.append(error)

    reader = threading.Thread(target=look)
    writers = [
        threading.Thread(target=lambda value=value: [write(path, {"x": torch.full((3000,), value)}) for _ in range(30)])
        for value in (1.0, 2.0, 3.0)
    ]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert failed == []
    assert [p.name for p in tmp_path.iterdir()] == ["key.safetensors"]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep a cache in .*--cache_dir"):
        make_folder(tmp_path / "file" / ".lora_cache")
    with pytest.raises(UserError, match="cannot write the cache file"):
        write(tmp_path / "none" / "key.safetensors", {"x": torch.zeros(1)})


def test_a_folder_without_permission_names_the_other_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.data.caches.files.os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="--cache_dir"):
        make_folder(tmp_path / "readonly")
