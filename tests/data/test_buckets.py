"""Bucket sizes and placements. Expected values come from kohya-ss/sd-scripts v0.10, BucketManager, run once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.config.data.dataset_config import DatasetSpec, SubsetSpec
from library.data.buckets import Buckets, Placement, bucket_sizes
from library.errors import UserError

MakeDataset = Callable[..., DatasetSpec]
SIDES = st.integers(1, 5000)
KOHYAS: dict[str, Any] = {
    "resolution": (512, 512),
    "min_bucket_reso": 256,
    "max_bucket_reso": 1024,
    "bucket_reso_steps": 64,
}


def test_sizes_at_512() -> None:
    wide = [(1024, 256), (960, 256), (896, 256), (832, 256), (768, 320), (704, 320), (640, 384), (576, 448), (512, 512)]
    sizes = bucket_sizes(512 * 512, 256, 1024, 64)
    assert [size for size in sizes if size[0] >= size[1]] == sorted(wide)
    assert sizes == sorted({*wide, *((height, width) for width, height in wide)})


@settings(max_examples=100)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 10), st.integers(0, 30), st.sampled_from([8, 32, 64]))
def test_sizes_keep_to_their_bounds(w: int, h: int, low: int, more: int, step: int) -> None:
    w, h, smallest = w * step, h * step, min(low, w, h) * step
    largest = max(w, h) + more * step
    sizes = bucket_sizes(w * h, smallest, largest, step)
    assert sizes == sorted(set(sizes))
    for width, height in sizes:
        assert width * height <= w * h
        assert width % step == height % step == 0
        assert (height, width) in sizes
        assert width == height or (smallest <= width <= largest and smallest <= height <= largest)


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((512, 512), (512, 512), (512, 512)),
        ((640, 480), (576, 448), (597, 448)),
        ((480, 640), (448, 576), (448, 597)),
        ((1920, 1080), (640, 384), (683, 384)),
        ((1000, 1000), (512, 512), (512, 512)),
        ((300, 1200), (256, 1024), (256, 1024)),
        ((5000, 400), (1024, 256), (3200, 256)),
        ((512, 768), (384, 640), (427, 640)),
        ((100, 90), (512, 512), (569, 512)),
        ((832, 320), (768, 320), (832, 320)),
        ((64, 64), (512, 512), (512, 512)),
        ((1023, 517), (704, 320), (704, 356)),
        ((600, 450), (576, 448), (597, 448)),
        ((700, 300), (768, 320), (768, 329)),
    ],
)
def test_nearest_aspect_ratio(dataset: MakeDataset, size: tuple, bucket: tuple, resized: tuple) -> None:
    buckets = Buckets(dataset(enable_bucket=True, **KOHYAS), multiple_of=8)
    assert buckets.place(size) == Placement(bucket, resized)


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((512, 512), (512, 512), (512, 512)),
        ((640, 480), (512, 384), (512, 384)),
        ((480, 640), (384, 512), (384, 512)),
        ((1920, 1080), (640, 384), (683, 384)),
        ((1000, 1000), (512, 512), (512, 512)),
        ((300, 1200), (256, 1024), (256, 1024)),
        ((5000, 400), (1600, 128), (1600, 128)),
        ((512, 768), (384, 576), (384, 576)),
        ((100, 90), (64, 64), (100, 90)),
        ((832, 320), (640, 256), (666, 256)),
        ((64, 64), (64, 64), (64, 64)),
        ((1023, 517), (576, 320), (633, 320)),
        ((600, 450), (512, 384), (512, 384)),
        ((700, 300), (640, 256), (700, 300)),
    ],
)
def test_without_enlarging(dataset: MakeDataset, size: tuple, bucket: tuple, resized: tuple) -> None:
    buckets = Buckets(dataset(enable_bucket=True, bucket_no_upscale=True, **KOHYAS), multiple_of=8)
    assert buckets.place(size) == Placement(bucket, resized)


@settings(max_examples=300)
@given(SIDES, SIDES, st.booleans())
def test_resized_image_covers_its_bucket(width: int, height: int, free: bool) -> None:
    spec = DatasetSpec(batch_size=1, enable_bucket=True, bucket_no_upscale=free, subsets=(), **KOHYAS)
    try:
        placement = Buckets(spec, multiple_of=8).place((width, height))
    except ValueError:
        assert free
        assert min(width, height) < 64 or max(width, height) > 9 * min(width, height)
        return
    (w, h), (rw, rh), (left, top) = placement.bucket, placement.resized, placement.crop
    assert rw >= w > 0
    assert rh >= h > 0
    assert w % 64 == h % 64 == 0
    assert w * h <= 512 * 512
    assert 0 <= left <= rw - w - left <= left + 1
    assert 0 <= top <= rh - h - top <= top + 1
    if free:
        assert rw <= width + 1
        assert rh <= height + 1
    elif min(width, height) > 50:
        assert abs(rw / rh / (width / height) - 1) < 0.02


def test_one_bucket_without_enable_bucket(dataset: MakeDataset) -> None:
    buckets = Buckets(dataset(resolution=(64, 96), bucket_no_upscale=True), multiple_of=8)
    assert buckets.sizes == [(64, 96)]
    assert buckets.place((640, 480)) == Placement((64, 96), (128, 96))
    assert buckets.place((640, 480)).crop == (32, 0)
    assert buckets.place((10, 100)) == Placement((64, 96), (64, 640))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": (500, 512)}, "resolution 500: must be a multiple of 32, such as 480 or 512"),
        ({"resolution": (512, 20)}, "resolution 20: must be a multiple of 32, such as 32 or 64"),
        ({"resolution": (512, 0)}, "resolution 0: must be a multiple of 32"),
        (
            {"enable_bucket": True, "bucket_reso_steps": 48},
            "bucket_reso_steps 48: must be a multiple of 32, such as 32 or 64",
        ),
        (
            {"enable_bucket": True, "resolution": (128, 512)},
            "min_bucket_reso 256: at most 128 for resolution 128,512",
        ),
        ({"enable_bucket": True, "resolution": (1100, 512)}, "max_bucket_reso 1024: at least 1100 for resolution"),
        ({"enable_bucket": True, "min_bucket_reso": 40}, "min_bucket_reso 40: at least 64, which is bucket_reso_steps"),
    ],
)
def test_wrong_options_are_named(dataset: MakeDataset, changes: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        Buckets(dataset(**{**KOHYAS, **changes}), multiple_of=32)
    assert message in str(error.value)


def test_all_that_is_wrong_is_said_with_its_place(dataset: MakeDataset, subset: Callable[..., SubsetSpec]) -> None:
    with pytest.raises(UserError) as error:
        Buckets(dataset(subset(origin="data.toml, subset 3"), resolution=(60, 70)), multiple_of=8)
    assert str(error.value).splitlines() == [
        "resolution 60: must be a multiple of 8, such as 56 or 64 (data set of data.toml, subset 3)",
        "resolution 70: must be a multiple of 8, such as 64 or 72 (data set of data.toml, subset 3)",
    ]


def test_bounds_are_widened_to_the_step_and_not_asked_for_without_enlarging(dataset: MakeDataset) -> None:
    spec = dataset(enable_bucket=True, **{**KOHYAS, "min_bucket_reso": 300, "max_bucket_reso": 1000})
    assert min(min(Buckets(spec, multiple_of=8).sizes)) == 256
    assert max(max(Buckets(spec, multiple_of=8).sizes)) == 1024
    small = dataset(enable_bucket=True, bucket_no_upscale=True, **{**KOHYAS, "resolution": (128, 128)})
    assert Buckets(small, multiple_of=8).place((640, 320)).bucket == (128, 64)
