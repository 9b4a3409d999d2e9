"""Masks follow the pixels, from alpha channels and from files, cached or not; and what is wrong with them is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.config.data.dataset_config import DatasetSpec, SubsetSpec
from library.data.caches.masks import cache_masks, latent_mask
from library.data.dataset import TrainingData
from library.data.images import load_mask, load_pixels, load_view
from library.data.prepare import prepare
from library.data.views import View
from library.errors import UserError

MakeSubset = Callable[..., SubsetSpec]
MakeDataset = Callable[..., DatasetSpec]
MakeFolder = Callable[..., Path]


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.nn.functional.avg_pool2d(pixels, 4)
    return mean, mean.abs()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def cut_out(tmp_path: Path) -> Path:
    """100 x 50, an alpha channel of noise."""
    path = tmp_path / "cut_out.png"
    Image.fromarray(noise(50, 100, 4)).save(path)
    return path


def test_alpha_weighs_and_the_colours_beneath_stay(cut_out: Path) -> None:
    view = View(cut_out, (100, 50), (10, 2), (80, 48), False, alpha_mask=True)
    rgba = noise(50, 100, 4)[2:50, 10:90]
    assert view.masked
    pixels, mask = load_view(view)
    np.testing.assert_allclose(mask, rgba[None, :, :, 3] / 255, atol=1e-6)
    np.testing.assert_allclose((pixels.permute(1, 2, 0).numpy() + 1) * 127.5, rgba[:, :, :3], atol=1e-4)
    assert torch.equal(mask, load_mask(view))
    assert torch.equal(pixels, load_pixels(view))
    without = replace(view, alpha_mask=False)
    assert load_view(without)[1] is None
    assert (load_pixels(without) >= pixels - 1e-6).all()  # on white


@pytest.mark.parametrize("interpolation", [None, "area", "bilinear", "nearest"])
@pytest.mark.parametrize("flip", [False, True])
def test_masks_follow_the_pixels(tmp_path: Path, interpolation: str | None, flip: bool) -> None:
    """Of an image whose colour is its alpha, the mask is the picture, however it is resized, cut and mirrored."""
    gray = noise(50, 100)
    Image.fromarray(np.stack([gray] * 4, -1)).save(tmp_path / "a.png")
    Image.fromarray(np.stack([gray, gray * 0, gray * 0], -1)).save(tmp_path / "m.png")
    view = View(tmp_path / "a.png", (96, 48), (7, 0), (64, 48), flip, interpolation, alpha_mask=True)
    from_file = replace(view, alpha_mask=False, mask=tmp_path / "m.png")
    for one in (view, from_file):
        expected = (load_pixels(view)[:1] + 1) / 2
        torch.testing.assert_close(load_mask(one), expected, atol=1e-5, rtol=0)


def test_images_without_alpha_are_learnt_whole(tmp_path: Path) -> None:
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png")
    view = View(tmp_path / "a.png", (8, 8), (0, 0), (8, 8), False, alpha_mask=True)
    assert torch.equal(load_mask(view), torch.ones(1, 8, 8))
    assert torch.equal(latent_mask(view, (2, 2)), torch.ones(1, 2, 2))


def test_a_latent_cell_has_the_mean_of_its_pixels(cut_out: Path) -> None:
    view = View(cut_out, (100, 50), (0, 0), (80, 48), False, alpha_mask=True)
    alpha = noise(50, 100, 4)[:48, :80, 3] / 255
    expected = alpha.reshape(6, 8, 10, 8).mean(axis=(1, 3))
    np.testing.assert_allclose(latent_mask(view, (6, 10))[0], expected, atol=1e-6)


def test_a_mask_is_turned_upright_and_read_in_gray_too(tmp_path: Path) -> None:
    Image.fromarray(noise(6, 4, 3)).save(tmp_path / "a.png")
    mask = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    Image.fromarray(mask).save(tmp_path / "m.png", exif=exif)
    view = View(tmp_path / "a.png", (4, 6), (0, 0), (4, 6), False, mask=tmp_path / "m.png")
    np.testing.assert_allclose(load_mask(view)[0], np.rot90(mask, -1) / 255, atol=1e-6)


def masked_data(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> TrainingData:
    """Alpha masks, mask files and no masks, in batches together, in two buckets."""
    alpha, files, plain = (folder(name, a=(64, 64), b=(100, 50)) for name in ("alpha", "files", "plain"))
    masks = folder("masks", a=(64, 64), b=(100, 50))
    for stem in "ab":
        with Image.open(alpha / f"{stem}.png") as image:
            size = image.size
        Image.fromarray(noise(size[1], size[0], 4, seed=3)).save(alpha / f"{stem}.png")
    parts = (
        subset(image_dir=alpha, alpha_mask=True, flip_aug=True, num_repeats=3),
        subset(image_dir=files, conditioning_data_dir=str(masks), flip_aug=True, num_repeats=3),
        subset(image_dir=plain, num_repeats=3),
    )
    return TrainingData(prepare([dataset(*parts, enable_bucket=True)], multiple_of=8), seed=1)


def test_batches_hold_masks_cached_or_not(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> None:
    data = masked_data(subset, dataset, folder)
    fresh = list(data.batches(data.plan(0), epoch=0, loader=data.loader(workers=0)))
    data.cache_latents(encode, batch_size=2)
    assert data.masks is not None
    assert data.masks.nbytes == 4 * 4 * (16 * 16 + 20 * 12)  # two ways round of four, of one channel
    for batch, cached in zip(fresh, data.batches(data.plan(0), epoch=0, loader=data.loader(workers=0)), strict=True):
        assert batch.masks is not None
        assert cached.masks is not None
        assert cached.moments is not None
        assert batch.pixels is not None
        assert batch.masks.shape == (len(batch.samples), 1, *batch.pixels.shape[2:])
        assert cached.masks.shape == (len(batch.samples), 1, *cached.moments[0].shape[2:])
        small = torch.nn.functional.interpolate(batch.masks, size=cached.masks.shape[2:], mode="area")
        torch.testing.assert_close(cached.masks, small)  # one by one there, a batch here
        for draw, mask in zip(cached.samples, cached.masks, strict=True):
            assert (mask == 1).all() == (draw.sample.path.parent.name == "plain")


def test_batches_without_masks_have_none(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> None:
    data = TrainingData(prepare([dataset(subset(image_dir=folder("a", b=(64, 64))))], multiple_of=8), seed=1)
    for _ in range(2):
        (batch,) = data.batches(data.plan(0), epoch=0, loader=data.loader(workers=0))
        assert batch.masks is None
        data.cache_latents(encode, batch_size=2)


def test_each_mask_is_read_once(cut_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = View(cut_out, (100, 50), (0, 0), (80, 48), False, alpha_mask=True)
    plain = replace(view, alpha_mask=False)
    read: list[View] = []
    monkeypatch.setattr("library.data.caches.masks.load_mask", lambda view: read.append(view) or torch.zeros(1, 48, 80))
    cache = cache_masks([view, plain, view], lambda view: (6, 10))
    assert read == [view]
    assert cache.get([plain, plain]) is None
    masks = cache.get([plain, view])
    assert masks is not None
    assert masks.shape == (2, 1, 6, 10)
    assert masks.flatten(1).mean(1).tolist() == [1, 0]


def test_mask_files_that_do_not_fit(
    subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    images, masks = folder("images", a=(64, 64), b=(64, 64)), folder("masks", a=(64, 64), c=(64, 64))
    spec = dataset(subset(image_dir=images, conditioning_data_dir=str(masks)))
    with pytest.raises(UserError, match=r"masks has no image of the same name for 1 images: b\.png"):
        prepare([spec], multiple_of=8)
    Image.new("L", (64, 32)).save(masks / "b.png")
    with pytest.raises(UserError, match=r"(?s)1 masks differ in size .*b\.png: 64 × 32, its image 64 × 64"):
        prepare([spec], multiple_of=8)
    Image.new("L", (64, 64)).save(masks / "b.webp")
    with pytest.raises(UserError, match=r"'b' has two masks: b\.png and b\.webp"):
        prepare([spec], multiple_of=8)
    (masks / "b.webp").unlink()
    (masks / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"(?s)1 unreadable images.*masks.b\.png"):
        prepare([spec], multiple_of=8)
    prepared = prepare([spec], multiple_of=8, skip_bad_images=True)
    assert [sample.path.name for sample in prepared.samples] == ["a.png"]
    assert prepared.samples[0].mask == masks / "a.png"
    assert "1 masks belong to no image (such as c.png)" in caplog.text
    with pytest.raises(UserError, match=r"data.toml, subset 1: conditioning_data_dir: no such folder: .*did you mean"):
        prepare([dataset(subset(image_dir=images, conditioning_data_dir=str(masks) + "s"))], multiple_of=8)


def test_alpha_mask_on_images_without_alpha_is_told(
    subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    prepare([dataset(subset(image_dir=folder("a", b=(64, 64)), alpha_mask=True))], multiple_of=8)
    assert "alpha_mask has no effect: no image has an alpha channel" in caplog.text
