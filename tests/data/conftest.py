"""Specs and small folders of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.config.data.dataset_config import DatasetSpec, SubsetSpec, plain_subset

TRAIN_IMAGES = Path(__file__).parents[2] / "quickstart" / "images" / "train"


@pytest.fixture
def train_images() -> Path:
    """64 x 64 RGB PNGs with .txt captions."""
    return TRAIN_IMAGES


@pytest.fixture
def subset(tmp_path: Path) -> Callable[..., SubsetSpec]:
    plain = plain_subset(tmp_path, origin="data.toml, subset 1", caption_extension=".txt")
    return lambda **changes: replace(plain, **changes)


@pytest.fixture
def dataset() -> Callable[..., DatasetSpec]:
    plain = DatasetSpec(
        resolution=(64, 64),
        batch_size=4,
        enable_bucket=False,
        min_bucket_reso=32,
        max_bucket_reso=128,
        bucket_reso_steps=16,
        bucket_no_upscale=False,
        subsets=(),
    )
    return lambda *subsets, **changes: replace(plain, subsets=subsets, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder("name", a=(48, 32), b=(64, 64)) makes noise images a.png, b.png with captions "a", "b"."""

    def make(name: str, **sizes: tuple[int, int]) -> Path:
        path = tmp_path / name
        path.mkdir()
        for stem, (width, height) in sizes.items():
            rng = np.random.default_rng(sum(stem.encode()))
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path / f"{stem}.png")
            (path / f"{stem}.txt").write_text(f"{stem}\n", encoding="utf-8")
        return path

    return make
