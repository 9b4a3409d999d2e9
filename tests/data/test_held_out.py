"""Images that are held back for validation: which, and that none of them is trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.config.data.dataset_config import DatasetSpec, SubsetSpec
from library.data.dataset import TrainingData
from library.data.prepare import prepare
from library.data.prepared import Prepared
from library.data.samples import Sample
from library.errors import UserError

MakeSubset = Callable[..., SubsetSpec]
MakeDataset = Callable[..., DatasetSpec]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twenty different pictures with captions, 00.png ... 19.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        picture = np.random.default_rng(number).integers(0, 256, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a, b, c, picture {number}\n", encoding="utf-8")
    return folder


def pictures(samples: Sequence[Sample]) -> set[bytes]:
    """What can be seen, by which leaks are found independently of the program's own hash."""
    return {Image.open(sample.path).convert("RGB").tobytes() for sample in samples}


def names(prepared: Prepared | None) -> list[str]:
    assert prepared is not None
    return sorted(sample.path.name for sample in prepared.samples)


def test_a_share_is_held_back_and_never_trained(images: Path, subset: MakeSubset, dataset: MakeDataset) -> None:
    spec = dataset(subset(image_dir=images, validation_split=0.25, num_repeats=3))
    prepared = prepare([spec], multiple_of=8)
    assert prepared.validation is not None
    assert (len(prepared.samples), len(prepared.validation.samples)) == (15, 5)
    assert not pictures(prepared.samples) & pictures(prepared.validation.samples)
    assert len(pictures([*prepared.samples, *prepared.validation.samples])) == 20
    assert [sample.repeats for sample in prepared.validation.samples] == [1] * 5
    assert sum(group.draws for group in prepared.groups) == 45
    (summary,) = prepared.summaries
    assert (summary.images, summary.held_out, summary.unused_reg_images) == (15, 5, 0)


def test_the_seed_decides_which(images: Path, subset: MakeSubset, dataset: MakeDataset) -> None:
    spec = dataset(subset(image_dir=images, validation_split=0.25))
    first, again, other = (prepare([spec], multiple_of=8, seed=seed).validation for seed in (1, 1, 2))
    assert names(first) == names(again) != names(other)
    own = dataset(subset(image_dir=images, validation_split=0.25, validation_seed=2))
    assert names(prepare([own], multiple_of=8, seed=1).validation) == names(other)


def test_names_and_order_decide_nothing(images: Path, tmp_path: Path, subset: MakeSubset, dataset: MakeDataset) -> None:
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number in range(20):
        for ending in (".png", ".txt"):
            shutil.copy(images / f"{number:02d}{ending}", renamed / f"{19 - number:02d}{ending}")
    one, two = (
        prepare([dataset(subset(image_dir=folder, validation_split=0.3))], multiple_of=8).validation
        for folder in (images, renamed)
    )
    assert one is not None
    assert two is not None
    assert [sample.key for sample in one.samples] == [sample.key for sample in two.samples]
    assert pictures(one.samples) == pictures(two.samples)


def test_copies_fall_on_one_side(
    images: Path, tmp_path: Path, subset: MakeSubset, dataset: MakeDataset, caplog: pytest.LogCaptureFixture
) -> None:
    """Under another name, saved anew, in another subset, among regularisation images, in another data set."""
    again, reg, apart = (tmp_path / name for name in ("again", "reg", "apart"))
    for folder in (again, reg, apart):
        folder.mkdir()
    for number in range(20):
        with Image.open(images / f"{number:02d}.png") as image:
            image.save(again / f"x{number}.webp", lossless=True)
            image.save(images / f"copy-{number}.png", compress_level=0)
            image.save(reg / f"{number}.png", pnginfo=None, compress_level=9)
            image.save(apart / f"{number}.bmp")
        for folder, stem in ((again, f"x{number}"), (images, f"copy-{number}"), (apart, str(number))):
            (folder / f"{stem}.txt").write_text(f"a, b, c, picture {number}\n", encoding="utf-8")
    parts = (
        subset(image_dir=images, validation_split=0.25, num_repeats=2),
        subset(image_dir=again, validation_split=0.0),
        subset(image_dir=reg, is_reg=True, validation_split=0.25, caption_extension=".caption"),
    )
    prepared = prepare([dataset(*parts), dataset(subset(image_dir=apart), resolution=(32, 32))], multiple_of=8)
    assert prepared.validation is not None
    assert len(prepared.validation.samples) == 5, "each picture once"
    assert not pictures(prepared.samples) & pictures(prepared.validation.samples)
    assert [summary.held_out for summary in prepared.summaries] == [10, 5, 5, 5]
    for folder in (again, reg, apart):
        assert f"{folder}: 5 images are not trained: they are copies of images held out for validation" in caplog.text
    assert str(images) + ": " not in caplog.text


def test_two_resolutions_hold_the_same_back(images: Path, subset: MakeSubset, dataset: MakeDataset) -> None:
    part = subset(image_dir=images, validation_split=0.2)
    prepared = prepare([dataset(part), dataset(part, resolution=(32, 32))], multiple_of=8)
    assert prepared.validation is not None
    assert len(pictures(prepared.validation.samples)) == 4
    assert sorted(group.size for group in prepared.validation.groups) == [(32, 32), (64, 64)]


def test_a_folder_of_its_own(images: Path, tmp_path: Path, subset: MakeSubset, dataset: MakeDataset) -> None:
    """Its captions are read as the subset's; what lies in both is not trained."""
    folder = tmp_path / "validation"
    folder.mkdir()
    shutil.copy(images / "03.png", folder / "same.png")
    Image.new("RGB", (50, 50), "red").save(folder / "red.png")
    (folder / "red.txt").write_text("red\n", encoding="utf-8")
    part = subset(image_dir=images, validation_dir=str(folder), class_tokens="thing", caption_prefix="p")
    prepared = prepare([dataset(part)], multiple_of=8)
    assert prepared.validation is not None
    assert sorted(sample.caption for sample in prepared.validation.samples) == ["red", "thing"]
    assert {sample.subset.caption_prefix for sample in prepared.validation.samples} == {"p"}
    assert "03.png" not in names(prepared)
    assert len(prepared.samples) == 19
    with pytest.raises(UserError, match=r"validation_dir: no such folder: .*validations, did you mean"):
        prepare([dataset(subset(image_dir=images, validation_dir=f"{folder}s"))], multiple_of=8)


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.02, r"images: validation_split 0.02 of 20 different images is none: at least 0.026"),
        (1.0, "no images to train: all of them are held out for validation: a smaller validation_split"),
    ],
)
def test_none_on_one_side(images: Path, subset: MakeSubset, dataset: MakeDataset, share: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare([dataset(subset(image_dir=images, validation_split=share))], multiple_of=8)


def test_the_least_share_that_is_named_is_enough(images: Path, subset: MakeSubset, dataset: MakeDataset) -> None:
    prepared = prepare([dataset(subset(image_dir=images, validation_split=0.026))], multiple_of=8)
    assert len(names(prepared.validation)) == 1


def test_what_is_validated_looks_and_reads_the_same_each_time(
    images: Path, subset: MakeSubset, dataset: MakeDataset
) -> None:
    """Resized without cutting anywhere, mirroring or colouring; captions whole and in their order."""
    part = subset(
        image_dir=images,
        validation_split=0.25,
        flip_aug=True,
        color_aug=True,
        random_crop=True,
        shuffle_caption=True,
        caption_dropout_rate=1.0,
        caption_dropout_every_n_epochs=1,
        caption_tag_dropout_rate=0.9,
        token_warmup_step=100.0,
        caption_prefix="p",
    )
    prepared = prepare([dataset(part, enable_bucket=True)], multiple_of=8)
    assert prepared.validation is not None
    data = TrainingData(prepared.validation, seed=3)
    assert data.plan(0) == TrainingData(prepared.validation, seed=3).plan(0)
    views = [view for planned in data.plan(0) for view in data.views(planned, 0)]
    assert not any(view.flip or view.jitter for view in views)
    assert {view.crop for view in views} == {
        ((w - s) // 2, (h - t) // 2) for v in views for (w, h), (s, t) in [(v.resized, v.size)]
    }
    assert all(view in data.cached_views() for view in views)
    texts = {data._caption(draw, 0) for draw in _draws(data)}
    assert texts == {f"p {sample.caption}" for sample in prepared.validation.samples}


def _draws(data: TrainingData) -> list:
    from library.data.dataset import Draw

    return [Draw(data.samples[index], 0, repeat) for planned in data.plan(0) for index, repeat in planned]


def test_wildcards_are_drawn_by_the_picture(images: Path, subset: MakeSubset, dataset: MakeDataset) -> None:
    for path in images.glob("*.txt"):
        path.write_text("{red|green|blue|black} thing", encoding="utf-8")
    part = subset(image_dir=images, validation_split=0.5, enable_wildcard=True)
    one, two = (prepare([replace(dataset(part), batch_size=size)], multiple_of=8).validation for size in (2, 3))
    assert one is not None
    assert two is not None
    texts = []
    for prepared in (one, two):
        data = TrainingData(prepared, seed=3)
        texts.append({draw.sample.key: data._caption(draw, 0) for draw in _draws(data)})
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) > 1
    assert not any("{" in text for text in texts[0].values())
