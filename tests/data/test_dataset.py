"""Batches: the same whatever the workers, the caches and the split; and what stands in them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.config.data.dataset_config import DatasetSpec, SubsetSpec
from library.data.dataset import Batch, TrainingData
from library.data.images import View, load_pixels
from library.data.loader import PixelLoader
from library.data.plan import of_rank, split_into_steps
from library.data.prepare import prepare
from library.data.prepared import Prepared
from library.errors import UserError
from library.rng import python_random

MakeSubset = Callable[..., SubsetSpec]
MakeDataset = Callable[..., DatasetSpec]
MakeFolder = Callable[..., Path]


@pytest.fixture
def prepared(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> Prepared:
    """Two buckets, shuffled captions, flips, regularisation images."""
    train = folder("train", a=(64, 64), b=(100, 50), c=(71, 64))
    for stem in "abc":
        (train / f"{stem}.txt").write_text(f"{stem}, 1, 2, 3, 4, 5, 6", encoding="utf-8")
    reg = folder("reg", d=(64, 64))
    parts = (
        subset(image_dir=train, num_repeats=5, flip_aug=True, shuffle_caption=True, keep_tokens=1),
        subset(image_dir=reg, is_reg=True),
    )
    return prepare([dataset(*parts, enable_bucket=True)], multiple_of=8)


def run(data: TrainingData, epoch: int, loader: PixelLoader | None = None) -> list[Batch]:
    return list(data.batches(data.plan(epoch), epoch=epoch, loader=loader or data.loader(workers=0)))


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for field in fields(Batch):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y, field.name


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.nn.functional.avg_pool2d(pixels, 4)
    return mean, mean.abs()


def test_an_epoch(prepared: Prepared) -> None:
    data = TrainingData(prepared, seed=1, prior_loss_weight=0.5)
    batches = run(data, 3)
    assert len(batches) == data.batches_per_epoch == 9
    seen = [draw for batch in batches for draw in batch.samples]
    assert len({(draw.sample.key, draw.repeat) for draw in seen}) == len(seen) == 30
    assert {draw.epoch for draw in seen} == {3}
    for batch in batches:
        width, height = batch.target_size
        assert batch.pixels is not None
        assert batch.moments is None
        assert batch.condition is None
        assert batch.pixels.shape == (len(batch.samples), 3, height, width)
        assert batch.original_sizes == [draw.sample.size for draw in batch.samples]
        for draw, caption, weight in zip(batch.samples, batch.captions, batch.loss_weights, strict=True):
            assert weight == (0.5 if draw.sample.subset.is_reg else 1.0)
            assert sorted(caption.split(", ")) == sorted(draw.sample.caption.split(", "))
            assert caption[0] == draw.sample.caption[0]


def test_draws_are_keyed(prepared: Prepared) -> None:
    data = TrainingData(prepared, seed=1)
    assert_equal(run(data, 0), run(TrainingData(prepared, seed=1), 0))
    texts = {caption for epoch in range(3) for batch in run(data, epoch) for caption in batch.captions}
    assert len(texts) > 40  # of 3 x 15 and one
    again = {caption for batch in run(TrainingData(prepared, seed=2), 0) for caption in batch.captions}
    assert len(again & texts) < 5
    plan = data.plan(0)
    loader = data.loader(workers=0)
    rest = list(data.batches(plan[4:], epoch=0, loader=loader))  # resumed within an epoch
    assert_equal(rest, run(data, 0)[4:])


def test_flips_are_fair_and_seen_in_the_crops(prepared: Prepared) -> None:
    data = TrainingData(prepared, seed=1)
    stored = {sample.path: load_pixels(View(sample.path, (64, 64), (0, 0), (64, 64), False)) for sample in data.samples}
    flips: dict[str, list[bool]] = {stem: [] for stem in "abcd"}
    crops: dict[str, set[tuple[int, int]]] = {stem: set() for stem in "abcd"}
    for batch in (batch for epoch in range(20) for batch in run(data, epoch)):
        assert batch.pixels is not None
        for draw, pixels, crop in zip(batch.samples, batch.pixels, batch.crops, strict=True):
            stem, original = draw.sample.path.stem, stored[draw.sample.path]
            crops[stem].add(crop)
            if stem in "ad":  # 64 x 64
                flips[stem].append(torch.equal(pixels, original.flip(-1)))
                assert flips[stem][-1] or torch.equal(pixels, original)
                key = (1, draw.epoch, draw.repeat, draw.sample.key, "flip")
                assert flips[stem][-1] == (stem == "a" and python_random(*key).random() < 0.5)
    assert 30 < sum(flips["a"]) < 70
    assert len(flips["a"]) == 100
    assert not any(flips["d"])
    assert len(flips["d"]) == 300
    assert crops["a"] == crops["d"] == {(0, 0)}
    assert crops["b"] == {(8, 0)}  # 100 x 50 → 96 x 48 → 80 x 48
    assert crops["c"] == {(3, 0), (4, 0)}  # 71 x 64 → 64 x 64


@pytest.fixture(params=["fork", "spawn"])
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    """How worker processes begin: as on Linux, or as on Windows and macOS."""
    if request.param not in multiprocessing.get_all_start_methods():
        pytest.skip("not on this platform")
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
def test_workers_change_nothing(prepared: Prepared, start_method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.data.loader.cpu_count", lambda: 2)
    data = TrainingData(prepared, seed=1)
    loader = PixelLoader(workers=2, most_batches=9, persistent=start_method == "spawn")
    assert loader.workers == 2
    before = torch.get_rng_state()
    for epoch in range(2):
        assert_equal(run(data, epoch, loader), run(data, epoch))
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing from the global stream


def test_persistent_workers_outlive_an_epoch_that_was_left_early(prepared: Prepared) -> None:
    data = TrainingData(prepared, seed=1)
    loader = PixelLoader(workers=2, most_batches=9, persistent=True)
    next(data.batches(data.plan(0), epoch=0, loader=loader))
    assert_equal(run(data, 1, loader), run(data, 1))


def test_cached_equals_uncached(prepared: Prepared) -> None:
    plain, cached = TrainingData(prepared, seed=1), TrainingData(prepared, seed=1)
    cached.cache_latents(encode, batch_size=3)
    for a, b in zip(run(plain, 0), run(cached, 0), strict=True):
        assert a.samples == b.samples
        assert a.captions == b.captions
        assert a.crops == b.crops
        assert b.pixels is None
        assert a.pixels is not None
        assert b.moments is not None
        for mean, expected in zip(b.moments, encode(a.pixels), strict=True):
            torch.testing.assert_close(mean, expected)  # encoded in other batches


def test_cached_text(subset: MakeSubset, dataset: MakeDataset, train_images: Path) -> None:
    spec = dataset(subset(image_dir=train_images, caption_prefix="flat,"))
    data = TrainingData(prepare([spec], multiple_of=4), seed=0)
    assert len(data.captions()) == len(set(data.captions()))
    assert data.captions()[0].startswith("flat, ")
    data.cache_captions(lambda texts: {"h": torch.tensor([[len(text)] for text in texts])}, batch_size=7)
    for batch in run(data, 0):
        assert batch.condition is not None
        assert batch.condition["h"][:, 0].tolist() == [len(caption) for caption in batch.captions]


def test_text_that_is_shuffled_cannot_be_cached(prepared: Prepared) -> None:
    with pytest.raises(AssertionError):
        TrainingData(prepared, seed=0).cache_captions(lambda texts: {}, batch_size=1)


def test_a_file_that_is_gone_is_named_in_one_line_by_a_worker(tmp_path: Path) -> None:
    gone = View(tmp_path / "gone.png", resized=(8, 8), crop=(0, 0), size=(8, 8), flip=False)
    batches = PixelLoader(workers=1, most_batches=1)([[gone]])
    with pytest.raises(UserError) as error:
        next(batches)
    assert str(gone.path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_are_capped_by_need(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.data.loader.cpu_count", lambda: 6)
    data = TrainingData(prepared, seed=1)
    assert data.loader(workers=8).workers == 6
    assert data.loader(workers=4).workers == 4
    assert data.loader(workers=8, world_size=3).workers == 3
    assert data.loader(workers=0, persistent=True).workers == 0
    data.cache_latents(encode, batch_size=8)
    assert data.loader(workers=8, persistent=True).workers == 0


def test_ranks_share_an_epoch(prepared: Prepared) -> None:
    data = TrainingData(prepared, seed=1)
    steps = split_into_steps(data.plan(0), world_size=2, accumulation=2)
    loader = data.loader(workers=0)
    shares = [list(data.batches(of_rank(steps, rank), epoch=0, loader=loader)) for rank in range(2)]
    assert [len(share) for share in shares] == [5, 4]
    merged = [batch for pair in zip(*shares, strict=False) for batch in pair] + shares[0][4:]
    assert_equal(merged, run(data, 0))


@pytest.fixture
def growing(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> Prepared:
    """Nine batches an epoch of captions that grow by a tag a step: at step n there are n + 1 tags of ten."""
    images = folder("images", a=(64, 64), b=(64, 64))
    for stem in "ab":
        (images / f"{stem}.txt").write_text(",".join("0123456789"), encoding="utf-8")
    spec = subset(image_dir=images, num_repeats=9, token_warmup_step=9)
    return prepare([dataset(spec, batch_size=2)], multiple_of=8)


def lengths(batches: list[Batch]) -> list[int]:
    """The tags of each batch's captions, which are the same within it."""
    counts = [{len(caption.split(", ")) for caption in batch.captions} for batch in batches]
    assert all(len(count) == 1 for count in counts)
    return [count.pop() for count in counts]


def test_token_warmup_goes_by_the_optimizers_steps(growing: Prepared) -> None:
    data = TrainingData(growing, seed=1, batches_per_step=2)
    assert lengths(run(data, 0)) == [1, 1, 2, 2, 3, 3, 4, 4, 5]  # the last step of an epoch may be short
    assert lengths(run(data, 1)) == [6, 6, 7, 7, 8, 8, 9, 9, 10]
    assert lengths(run(data, 2)) == [10] * 9
    assert lengths(run(TrainingData(growing, seed=1), 0)) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_token_warmup_is_the_same_for_a_resumed_run_and_for_several_processes(growing: Prepared) -> None:
    data = TrainingData(growing, seed=1, batches_per_step=4)
    whole = run(data, 1)
    loader = data.loader(workers=0)
    assert_equal(list(data.batches(data.plan(1)[4:], epoch=1, loader=loader)), whole[4:])
    steps = split_into_steps(data.plan(1), world_size=2, accumulation=2)
    shares = [list(data.batches(of_rank(steps, rank), epoch=1, loader=loader)) for rank in range(2)]
    merged = [batch for pair in zip(*shares, strict=False) for batch in pair] + shares[0][4:]
    assert_equal(merged, whole)


def test_token_warmup_over_a_share_of_all_steps(growing: Prepared, subset: MakeSubset) -> None:
    (spec,) = {sample.subset for sample in growing.samples}
    samples = [replace(sample, subset=replace(spec, token_warmup_step=0.5)) for sample in growing.samples]
    data = TrainingData(replace(growing, samples=samples), seed=1, total_steps=18)
    assert lengths(run(data, 0)) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_dropped_captions_are_empty(prepared: Prepared) -> None:
    (train,) = {sample.subset for sample in prepared.samples if not sample.subset.is_reg}
    spec = replace(train, caption_dropout_every_n_epochs=2)
    samples = [s if s.subset.is_reg else replace(s, subset=spec) for s in prepared.samples]
    data = TrainingData(replace(prepared, samples=samples), seed=1)
    for epoch, empty in ((0, False), (1, True), (2, False)):
        for batch in run(data, epoch):
            for draw, caption in zip(batch.samples, batch.captions, strict=True):
                assert (caption == "") == (empty and not draw.sample.subset.is_reg)


def test_the_example_is_a_text_of_the_first_epoch(prepared: Prepared) -> None:
    data = TrainingData(prepared, seed=1)
    trained = {(draw.sample.subset, c) for b in run(data, 0) for draw, c in zip(b.samples, b.captions, strict=True)}
    for spec in {sample.subset for sample in prepared.samples}:
        assert (spec, data.example(spec)) in trained
