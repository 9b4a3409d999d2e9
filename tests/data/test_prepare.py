"""Specs → placed samples: what is found, left out, refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from library.config.data.dataset_config import DatasetSpec, SubsetSpec
from library.data.prepare import inspect, prepare
from library.errors import UserError

MakeSubset = Callable[..., SubsetSpec]
MakeDataset = Callable[..., DatasetSpec]
MakeFolder = Callable[..., Path]


def test_two_data_sets_with_buckets(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> None:
    first, second = folder("first", a=(64, 64), b=(100, 50), c=(200, 100)), folder("second", d=(30, 60))
    prepared = prepare(
        [
            dataset(subset(image_dir=first, num_repeats=2), enable_bucket=True),
            dataset(subset(image_dir=second), resolution=(32, 32), batch_size=1),
        ],
        multiple_of=16,
    )
    assert [(sample.key, sample.size) for sample in prepared.samples] == [
        ("0/a.png", (64, 64)),
        ("0/b.png", (100, 50)),
        ("0/c.png", (200, 100)),
        ("1/d.png", (30, 60)),
    ]
    found = [(group.dataset, group.size, group.batch_size, group.members) for group in prepared.groups]
    assert found == [
        (0, (64, 64), 4, ((0, 2),)),
        (0, (80, 48), 4, ((1, 2), (2, 2))),
        (1, (32, 32), 1, ((3, 1),)),
    ]
    assert [placement.bucket for placement in prepared.placements] == [(64, 64), (80, 48), (80, 48), (32, 32)]
    assert [summary.images for summary in prepared.summaries] == [3, 1]


def test_images_no_larger_than_asked_are_left_out_of_a_data_set(
    subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """By their area, that size included, as in kohya; another data set has the same folder whole."""
    caplog.set_level(logging.INFO)
    images = folder("first", a=(64, 64), b=(128, 32), c=(65, 64), d=(200, 100))
    (images / "e.png").write_bytes(b"")
    both = subset(image_dir=images)
    prepared = prepare(
        [dataset(both), dataset(both, skip_image_resolution=(64, 64))], multiple_of=8, skip_bad_images=True
    )
    assert [(sample.key, sample.path.name) for sample in prepared.samples] == [
        *((f"0/{name}", name) for name in ("a.png", "b.png", "c.png", "d.png")),
        *((f"1/{name}", name) for name in ("c.png", "d.png")),
    ]
    assert [(summary.images, summary.too_small, summary.bad_images) for summary in prepared.summaries] == [
        (4, 0, 1),
        (2, 2, 1),
    ]
    said = "2 of 4 images are left out, no larger than the 64 × 64 of skip_image_resolution (such as a.png, 64 × 64)"
    assert said in caplog.text
    with pytest.raises(UserError, match=r"no images to train: none is larger than the 500 × 40 of skip_image_res"):
        prepare([dataset(both, skip_image_resolution=(500, 40))], multiple_of=8, skip_bad_images=True)


def test_bad_images_are_all_listed_or_left_out(
    subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = folder("first", a=(64, 64), b=(64, 64)), folder("second", c=(64, 64), d=(64, 64))
    for path in (first / "b.png", second / "c.png"):
        path.write_bytes(path.read_bytes()[:500])
    spec = dataset(subset(image_dir=first), subset(image_dir=second))
    with pytest.raises(UserError, match=r"(?s)2 unreadable images.*b\.png: .*c\.png: "):
        prepare([spec], multiple_of=8)
    prepared = prepare([spec], multiple_of=8, skip_bad_images=True)
    assert [sample.path.name for sample in prepared.samples] == ["a.png", "d.png"]
    assert [summary.bad_images for summary in prepared.summaries] == [1, 1]
    assert "2 unreadable images are left out" in caplog.text
    for path in (first / "a.png", second / "d.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no images to train"):
        prepare([spec], multiple_of=8, skip_bad_images=True)


def test_regularisation_images_are_balanced_within_their_data_set(
    subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    train, reg = folder("train", a=(64, 64), b=(64, 64)), folder("reg", c=(64, 64), d=(64, 64), e=(64, 64))
    parts = subset(image_dir=reg, is_reg=True), subset(image_dir=train, num_repeats=1)
    prepared = prepare([dataset(*parts)], multiple_of=8)
    assert [sample.path.name for sample in prepared.samples] == ["a.png", "b.png", "c.png", "d.png"]
    assert [(summary.images, summary.unused_reg_images) for summary in prepared.summaries] == [(2, 1), (2, 0)]
    assert "1 regularisation images are more than needed" in caplog.text
    with pytest.raises(UserError, match="only regularisation images"):
        prepare([dataset(parts[0])], multiple_of=8)


def test_one_folder_in_two_data_sets(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> None:
    path = folder("images", a=(64, 64))
    twice = prepare([dataset(subset(image_dir=path)), dataset(subset(image_dir=path))], multiple_of=8)
    assert [sample.key for sample in twice.samples] == ["0/a.png", "1/a.png"]
    assert [summary.images for summary in twice.summaries] == [1, 1]


def test_one_folder_at_several_resolutions(
    subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """The same as a data set for each resolution, in every draw; the folder is read, and warned about, once."""
    path = folder("images", a=(64, 64), b=(80, 48), c=(100, 100))
    (path / "b.txt").unlink()
    first, second = subset(image_dir=path, num_repeats=2), subset(image_dir=path, num_repeats=2, origin="another")
    common = {"enable_bucket": True, "batch_size": 2}
    together = [dataset(first, resolution=(size, size), **common) for size in (64, 96)]
    apart = [dataset(first, **common), dataset(second, resolution=(96, 96), **common)]
    caplog.set_level(logging.WARNING)
    one = prepare(together, multiple_of=16)
    assert len(caplog.records) == 1
    other = prepare(apart, multiple_of=16)
    assert [sample.key for sample in one.samples] == [sample.key for sample in other.samples]
    assert (one.placements, one.groups) == (other.placements, other.groups)
    assert {placement.bucket for placement in one.placements} == {(64, 64), (80, 48), (96, 96), (112, 80)}
    assert (one.train_images, one.batches_per_epoch) == (3, 2 * (2 + 1))


def test_images_too_small_for_a_bucket(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> None:
    path = folder("images", a=(64, 64), b=(15, 64), c=(10, 10))
    spec = dataset(subset(image_dir=path), enable_bucket=True, bucket_no_upscale=True)
    with pytest.raises(UserError, match=r"2 images are too small .*b\.png: 15 x 64 px.*bucket_reso_steps"):
        prepare([spec], multiple_of=8)


def test_what_is_told_fast_is_told_first(
    subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong options before missing folders, and both before the images are decoded."""
    monkeypatch.setattr("library.data.sources.find.check_images", lambda paths: pytest.fail("decoded"))
    path = folder("images", a=(64, 64))
    with pytest.raises(UserError, match="resolution 60"):
        prepare([dataset(subset(image_dir=path / "gone"), resolution=(60, 64))], multiple_of=8)
    with pytest.raises(UserError, match="no such folder"):
        prepare([dataset(subset(image_dir=path), subset(image_dir=path / "gone"))], multiple_of=8)


def test_the_data_check_lists_what_training_stops_at(
    subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder, tmp_path: Path
) -> None:
    """Broken images, masks and captions, wherever they lie; and images of a folder for validation."""
    images, masks, apart = (
        folder("all", a=(64, 64), b=(64, 64), c=(64, 64)),
        folder("masks", a=(64, 64)),
        folder("apart"),
    )
    for path in (images / "b.png", masks / "b.png", masks / "c.png", apart / "d.png"):
        path.write_bytes(b"no image")
    (images / "a.txt").write_bytes(b"caf\xe9")
    (masks / "c.png").write_bytes((masks / "a.png").read_bytes())
    listed = tmp_path / "list.json"
    listed.write_text('{"all/a.png": {"caption": "a"}, "all/b.png": {"caption": "b"}}', encoding="utf-8")
    spec = dataset(subset(image_dir=images, conditioning_data_dir=str(masks), validation_dir=str(apart)))
    by_file = dataset(subset(image_dir=tmp_path, metadata_file=listed))
    first, second, third = inspect([spec, by_file], multiple_of=8)
    assert {path.relative_to(tmp_path).as_posix() for path in first.faults} == {"all/b.png", "masks/b.png", "all/a.txt"}
    assert {path.relative_to(tmp_path).as_posix() for path in third.faults} == {"all/b.png"}
    assert [picture.path.name for picture in first.pictures] == ["a.png", "c.png"]
    assert [picture.path.name for picture in third.pictures] == ["a.png"]
    assert (second.source, second.pictures) == (apart, ())
    with pytest.raises(UserError, match="not UTF-8"):
        prepare([spec], multiple_of=8)
