"""On disk: what has changed is encoded, what has not is never; whoever was interrupted or helped."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.data.caches import disk as disk_cache
from library.data.caches import keys as cache_keys
from library.data.caches.disk import Disk, DiskLatents, Team, cache_captions, cache_images
from library.data.caches.memory import encode_captions, encode_images
from library.data.color import Jitter
from library.data.images import load_pixels
from library.data.views import View
from library.errors import UserError
from tests.conftest import PATIENCE

MakeFolder = Callable[..., Path]
ROOT = Path(__file__).parents[2]
DISK = Disk(encoder="VAE a, fp32")


class Encoder:
    """A stand-in for a VAE of factor 4, which counts what it is given."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.images += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels, 4)
        return mean, mean.abs() / 2


@pytest.fixture
def images(folder: MakeFolder) -> Path:
    return folder("images", a=(16, 16), b=(16, 16), c=(16, 16), d=(16, 24), e=(16, 24))


@pytest.fixture
def views(images: Path) -> list[View]:
    sizes = {"a": (16, 16), "b": (16, 16), "c": (16, 16), "d": (16, 24), "e": (16, 24)}
    return [View(images / f"{stem}.png", size, (0, 0), size, False) for stem, size in sizes.items()]


def cached(views: list[View], disk: Disk = DISK, batch_size: int = 2) -> int:
    """How many images this run encodes; everything can be read afterwards."""
    encoder = Encoder()
    cache = cache_images(views, encoder, batch_size=batch_size, disk=disk)
    for view in views:
        cache.get([view])
    return encoder.images


def entries(images: Path, kind: str = "latents") -> list[Path]:
    return sorted((images / ".lora_cache" / kind).glob("*.safetensors"))


def test_it_gives_what_memory_gives(views: list[View]) -> None:
    mirrored = [replace(view, flip=True) for view in views]
    kept = encode_images([*views, *mirrored], Encoder(), batch_size=2)
    first = cache_images([*views, *mirrored], Encoder(), batch_size=2, disk=DISK)
    again = cache_images([*views, *mirrored], Encoder(), batch_size=3, disk=DISK)
    wanted = [views[2], mirrored[0], views[2]]
    for cache in (first, again):
        for expected, found in zip(kept.get(wanted), cache.get(wanted), strict=True):
            torch.testing.assert_close(expected, found)  # encoded in other batches
    assert again.get(mirrored[3:])[0].shape == (2, 3, 6, 4)


def test_nothing_is_encoded_twice(views: list[View], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert cached([*views, *views]) == 5
        assert cached(views, batch_size=1) == 0
    (first, second) = (record.getMessage() for record in caplog.records)
    assert "0 read (0.0 MB), 5 encoded (0.0 MB), for 5 images, in" in first
    assert "5 read (0.0 MB), 0 encoded" in second
    assert ".lora_cache" in second


def test_a_changed_image_is_encoded_though_its_size_and_time_are_the_same(views: list[View]) -> None:
    path = views[1].path
    pixels = np.asarray(Image.open(path))
    Image.fromarray(pixels).save(path, format="BMP")
    before = path.stat()
    cached(views)
    Image.fromarray(255 - pixels).save(path, format="BMP")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert cached(views) == 1
    Image.fromarray(pixels).save(path, format="BMP")
    assert cached(views) == 0, "the old image's latents are still there"


def test_a_touched_or_renamed_image_is_not_encoded(views: list[View]) -> None:
    cached(views)
    os.utime(views[0].path, (1, 1))
    renamed = [replace(views[0], path=views[0].path.rename(views[0].path.with_stem("z"))), *views[1:]]
    assert cached(renamed) == 0


def test_every_field_of_a_view_counts(views: list[View]) -> None:
    """A field that is added to View must be added here, so that someone thinks of it."""
    cached(views)
    changes = {
        "resized": (16, 32),
        "crop": (0, 4),
        "size": (16, 20),
        "flip": True,
        "interpolation": "box",
        "alpha_mask": True,
        "mask": views[4].path,
        "jitter": Jitter(gamma=1.01),
    }
    assert {"path", *changes} == set(View.__dataclass_fields__)
    view = replace(views[0], path=views[3].path, resized=(16, 24))
    cached([view])
    for name, value in changes.items():
        assert cached([replace(view, **{name: value})]) == 1, name
    shutil.copy(views[0].path, views[4].path)
    assert cached([replace(view, mask=views[4].path)]) == 1, "another mask in the same file"


@pytest.mark.parametrize("encoder", ["VAE b, fp32", "VAE a, bf16"])
def test_another_encoder_or_precision_encodes_anew(views: list[View], encoder: str) -> None:
    cached(views)
    assert cached(views, replace(DISK, encoder=encoder)) == 5
    assert cached(views) == 0


def test_new_code_encodes_anew(views: list[View], monkeypatch: pytest.MonkeyPatch) -> None:
    cached(views)
    monkeypatch.setattr("library.data.caches.keys.VERSION", 10**6)
    assert cached(views) == 5


def test_kohyas_own_files_are_not_touched_nor_used(views: list[View], images: Path) -> None:
    stale = images / "a_0016x0016_sd.npz"
    np.savez(stale, latents=np.zeros((3, 4, 4)))
    before = stale.read_bytes()
    assert cached(views) == 5
    assert stale.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
        lambda path: path.write_bytes(b"no file of ours"),
        lambda path: shutil.copy(path.parent / sorted(os.listdir(path.parent))[-1], path),
    ],
    ids=["empty", "cut off", "damaged", "other", "another's"],
)
def test_a_broken_file_is_made_again_and_said(
    views: list[View], images: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    cached(views)
    path = entries(images)[0]
    good = path.read_bytes()
    damage(path)
    assert path.read_bytes() != good
    caplog.clear()
    assert cached(views) == 1
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert str(path) in warning
    assert path.read_bytes() == good
    assert cached(views) == 0


def test_skipping_the_check_finds_damage_where_it_matters(views: list[View], images: Path) -> None:
    trusting = replace(DISK, trust=True)
    cached(views)
    entries(images)[0].unlink()
    assert cached(views, trusting) == 1
    path = entries(images)[0]
    path.write_bytes(path.read_bytes()[:-1])
    cache = cache_images(views, Encoder(), batch_size=2, disk=trusting)
    with pytest.raises(UserError, match=rf"{path.name} cannot be used: .*without --skip_cache_check"):
        _ = [cache.get([view]) for view in views]


def test_an_image_that_changes_meanwhile_is_not_stored(
    views: list[View], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_pixels = disk_cache.load_pixels

    def slow(view: View) -> Tensor:
        if view.path.stem == "b":
            view.path.write_bytes(views[0].path.read_bytes())
        return load_pixels(view)

    monkeypatch.setattr(disk_cache, "load_pixels", slow)
    with pytest.raises(UserError, match=r"b\.png was changed"):
        cached(views, batch_size=1)
    assert len(entries(images)) == 1  # "a" was done


def test_one_place_for_all(views: list[View], images: Path, tmp_path: Path) -> None:
    disk = replace(DISK, folder=tmp_path / "cache")
    assert cached(views, disk) == 5
    assert not (images / ".lora_cache").exists()
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 5
    shutil.copytree(images, tmp_path / "copy")
    elsewhere = [replace(view, path=tmp_path / "copy" / view.path.name) for view in views]
    assert cached(elsewhere, disk) == 0


def test_copies_of_an_image_are_encoded_once(views: list[View], images: Path) -> None:
    shutil.copy(views[0].path, images / "copy.png")
    assert cached([*views, replace(views[0], path=images / "copy.png")]) == 5


def test_left_overs(views: list[View], images: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached(views)
    folder = images / ".lora_cache" / "latents"
    old, new = folder / ".old.1-aa.part", folder / ".new.1-aa.part"
    old.write_bytes(b"1")
    new.write_bytes(b"1")
    os.utime(old, (1, 1))
    with caplog.at_level(logging.INFO):
        cached(views[:3])
    assert not old.exists()
    assert new.exists(), "it may be another run's"
    assert "also holds 2 files" in caplog.text


def test_what_was_done_before_a_kill_is_kept(views: list[View], images: Path) -> None:
    code = f"""
import sys, time, torch
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from library.data.color import Jitter
from library.data.caches.disk import Disk, cache_images
from library.data.images import load_pixels
from library.data.views import View
encoded = 0
def encode(pixels):
    global encoded
    if encoded == 4:
        time.sleep({2 * PATIENCE})  # it is killed here, however slow the machine is
    encoded += 1
    mean = torch.nn.functional.avg_pool2d(pixels, 4)
    return mean, mean.abs() / 2
views = [View(path, (16, 16), (0, 0), (16, 16), flip) for path in sorted(Path({str(images)!r}).glob("*.png"))
         for flip in (False, True)]
cache_images(views, encode, batch_size=1, disk=Disk(encoder="x"))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + PATIENCE
    try:
        while len(entries(images)) < 4:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    same = [View(v.path, (16, 16), (0, 0), (16, 16), flip) for v in views for flip in (False, True)]
    assert cached(same, replace(DISK, encoder="x")) == 10 - 4


class Teams:
    """Threads stand in for the two processes of a run, each with its own view of the disk."""

    def __init__(self, *disks: Disk) -> None:
        self.disks = disks
        self.barrier = threading.Barrier(len(disks), timeout=PATIENCE)
        self.boxes: list[list[Any]] = [[] for _ in disks]
        self.encoded = [0 for _ in disks]

    def gather(self, rank: int, mine: list[Any]) -> list[Any]:
        self.boxes[rank] = mine
        self.barrier.wait()
        joined = [item for box in self.boxes for item in box]
        self.barrier.wait()
        return joined

    def run(self, views: list[View]) -> list[int]:
        """How many images each encodes."""

        def work(rank: int) -> None:
            team = Team(rank, len(self.disks), partial(self.gather, rank))
            self.encoded[rank] = cached(views, replace(self.disks[rank], team=team))

        in_threads(*(partial(work, rank) for rank in range(len(self.disks))))
        return self.encoded


def in_threads(*works: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_team_shares_the_work(views: list[View], images: Path) -> None:
    team = Teams(DISK, DISK)
    assert team.run(views) == [3, 2]
    assert team.run(views) == [0, 0]
    for path in entries(images)[:3]:
        path.unlink()
    assert team.run(views) == [2, 1], "what is missing is shared out, wherever it stands in the list"


def test_machines_with_disks_of_their_own_both_have_all(views: list[View], tmp_path: Path) -> None:
    team = Teams(replace(DISK, folder=tmp_path / "one"), replace(DISK, folder=tmp_path / "two"))
    assert team.run(views) == [5, 5]
    assert team.run(views) == [0, 0]


def test_two_runs_on_one_folder_at_a_time(views: list[View], images: Path) -> None:
    many = [replace(view, flip=flip) for view in views for flip in (False, True)]
    in_threads(*[partial(cached, many)] * 3)
    assert cached(many) == 0
    assert sorted(path.suffix for path in (images / ".lora_cache" / "latents").iterdir()) == [".safetensors"] * 10


def test_it_is_not_held_in_memory(views: list[View], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_images(views, Encoder(), batch_size=2, disk=DISK)
    reads: list[Path] = []
    read = disk_cache.cache_files.read
    monkeypatch.setattr(disk_cache.cache_files, "read", lambda path: reads.append(path) or read(path))
    assert isinstance(cache, DiskLatents)
    cache.get(views[:3])
    cache.get(views[:3])
    assert len(reads) == 6


def test_captions(images: Path) -> None:
    asked: list[str] = []

    def encode(captions: list[str]) -> dict[str, Tensor]:
        asked.extend(captions)
        lengths = torch.tensor([[float(len(caption))] * 3 for caption in captions])
        return {"hidden_states": lengths.bfloat16(), "mask": lengths.long()}

    def cache(*captions: str, encoder: str = "CLIP") -> disk_cache.DiskTexts:
        asked.clear()
        folders = dict.fromkeys(captions, images)
        return cache_captions(folders, encode, batch_size=2, disk=Disk(encoder=encoder))

    first = cache("a", "bb", "")
    assert asked == ["a", "bb", ""]
    expected = encode_captions(["a", "bb", ""], encode, batch_size=3).get(["", "bb", ""])
    again = cache("a", "bb", "")
    assert asked == []
    for found in (first.get(["", "bb", ""]), again.get(["", "bb", ""])):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    cache("a", "bb ", "")
    assert asked == ["bb "]
    cache("a", encoder="CLIP, clip skip 2")
    assert asked == ["a"]
    assert len(entries(images, "texts")) == 5


def test_pixels_are_those_of_this_version(tmp_path: Path) -> None:
    """If this fails because images are read in another way now, raise `cache_keys.VERSION` and note the new numbers."""
    ramp = np.add.outer(np.arange(90), np.arange(120))[:, :, None] * np.array([1, 2, 3])
    Image.fromarray((ramp % 256).astype(np.uint8)).save(tmp_path / "ramp.png")
    view = View(tmp_path / "ramp.png", resized=(64, 48), crop=(3, 5), size=(48, 32), flip=True)
    pixels = load_pixels(view)
    assert cache_keys.VERSION == 2
    expected = [[-0.1843, -0.2873, -0.4196], [0.6314, 0.4254, 0.1608], [-0.5608, -0.8698, 0.7412]]
    torch.testing.assert_close(
        pixels[:, [0, 13, 31], [0, 20, 47]],
        torch.tensor(expected),
        rtol=0,
        atol=2e-3,
    )
