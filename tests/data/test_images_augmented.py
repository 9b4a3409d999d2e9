"""What varies from sight to sight: random cuts, cuts about faces, colours. Keyed, within bounds, told truly."""

from __future__ import annotations

import colorsys
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.config.data.dataset_config import DatasetSpec, SubsetSpec
from library.data.color import Jitter, apply_jitter, draw_jitter, turn_hue
from library.data.crops import face_crop, face_in_name, is_within, random_crop
from library.data.dataset import TrainingData
from library.data.images import load_pixels
from library.data.prepare import prepare
from library.data.samples import Face
from library.data.views import View, refuse_latent_cache_of_changing_images
from library.errors import UserError

MakeSubset = Callable[..., SubsetSpec]
MakeDataset = Callable[..., DatasetSpec]
MakeFolder = Callable[..., Path]


def views(spec: DatasetSpec, *, epochs: int = 1, seed: int = 1) -> list[View]:
    data = TrainingData(prepare([spec], multiple_of=8), seed=seed)
    return [view for epoch in range(epochs) for planned in data.plan(epoch) for view in data.views(planned, epoch)]


def test_random_crops_reach_every_place_and_no_other() -> None:
    found = {random_crop((10, 9), (8, 8), random.Random(i)) for i in range(200)}
    assert found == {(left, top) for left in range(3) for top in range(2)}


def test_random_crop_in_buckets(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> None:
    """100 x 50 is resized to 96 x 48, of which 80 x 48 are seen."""
    part = subset(image_dir=folder("a", b=(100, 50)), num_repeats=200, random_crop=True, flip_aug=True)
    seen = views(dataset(part, enable_bucket=True))
    assert {(view.resized, view.size) for view in seen} == {((96, 48), (80, 48))}
    assert {view.crop for view in seen} == {(left, 0) for left in range(17)}
    assert seen == views(dataset(part, enable_bucket=True))
    assert seen != views(dataset(part, enable_bucket=True), seed=2)


def test_random_crop_without_buckets_takes_a_piece_at_full_size(
    subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder
) -> None:
    path = folder("a", large=(100, 90), small=(32, 48))
    seen = views(dataset(subset(image_dir=path, num_repeats=300, random_crop=True)))
    large = [view for view in seen if view.path.stem == "large"]
    assert {view.resized for view in large} == {(100, 90)}
    assert {view.crop[0] for view in large} == set(range(37))
    assert {view.crop[1] for view in large} == set(range(27))
    small = {(view.resized, view.crop) for view in seen if view.path.stem == "small"}
    assert {resized for resized, _ in small} == {(64, 96)}  # enlarged just so far that it fills the picture
    assert len(small) > 20
    assert {view.resized for view in views(dataset(subset(image_dir=path)))} == {(71, 64), (64, 96)}


def test_batches_tell_where_they_were_cut(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> None:
    part = subset(image_dir=folder("a", b=(100, 90)), num_repeats=20, random_crop=True, flip_aug=True)
    data = TrainingData(prepare([dataset(part)], multiple_of=8), seed=1)
    whole = load_pixels(View(part.image_dir / "b.png", (100, 90), (0, 0), (100, 90), False))
    flipped = 0
    for batch in data.batches(data.plan(0), epoch=0, loader=data.loader(workers=0)):
        assert batch.pixels is not None
        assert batch.original_sizes == [(100, 90)] * len(batch.samples)
        for pixels, (left, top) in zip(batch.pixels, batch.crops, strict=True):
            straight = torch.equal(pixels, whole[:, top : top + 64, left : left + 64])
            # (left, top) counts in the image as it is seen, mirrored
            assert straight or torch.equal(pixels, whole.flip(-1)[:, top : top + 64, left : left + 64])
            flipped += not straight
    assert 3 < flipped < 17


def test_faces_stand_in_names() -> None:
    assert face_in_name(Path("a/photo_120_80_64_70.png")) == Face(120, 80, 64, 70)
    assert face_in_name(Path("my_cat_1_2_3_4.jpg")) == Face(1, 2, 3, 4)
    for name in ("photo.png", "photo_1_2_3.png", "1_2_3_4.png", "photo_1_2_3_x.png"):
        assert face_in_name(Path(name)) is None
    assert is_within(Face(10, 10, 5, 5), (64, 64))
    for face in (Face(64, 10, 5, 5), Face(10, 10, 0, 5), Face(2023, 10, 12, 5), Face(10, 10, 65, 5)):
        assert not is_within(face, (64, 64))


def face_crops(image: tuple[int, int], *, anywhere: bool = False, among: tuple[float, float] = (2.0, 4.0)) -> list:
    face = Face(300, 200, 50, 60)
    arguments = {"image": image, "size": (128, 160), "among": among, "anywhere": anywhere}
    return [face_crop(face, **arguments, rng=random.Random(i)) for i in range(300)]


def test_face_crops_are_so_many_times_the_face() -> None:
    shares = []
    for resized, (left, top) in face_crops((800, 600)):
        scale = resized[0] / 800
        shares.append(128 / (60 * scale))
        assert abs(left + 64 - 300 * scale) <= 4.5  # 60 // 20 and the rounding
        assert abs(top + 80 - 200 * scale) <= 4.5
    assert min(shares) < 2.15
    assert max(shares) > 3.8
    assert min(shares) > 1.99
    assert max(shares) < 4.01
    assert {crop for _, crop in face_crops((800, 600), among=(3.0, 3.0))} == {(149, 62)}  # 300 · 0.711 - 64, …


def test_face_crops_stay_in_the_image_and_enlarge_it_no_more_than_needed() -> None:
    for image in ((800, 600), (320, 600), (301, 202), (90, 90)):
        for anywhere in (False, True):
            for resized, (left, top) in face_crops(image, anywhere=anywhere):
                assert 0 <= left <= resized[0] - 128
                assert 0 <= top <= resized[1] - 160
                covers = max(128 / image[0], 160 / image[1])
                assert resized[0] <= round(max(1, covers) * image[0]) + 1
    spread = {left for _, (left, _) in face_crops((800, 600), anywhere=True)}
    assert len(spread) > 100


def test_face_crop_reaches_the_view(
    subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder("a", a_60_40_20_20=(120, 90), plain=(120, 90))
    part = subset(image_dir=path, num_repeats=50, face_crop_aug_range=(1.5, 4.0))
    seen = views(dataset(part))
    assert len({view.resized for view in seen if view.path.stem != "plain"}) > 10
    assert {view.crop for view in seen if view.path.stem == "plain"} == {(10, 0)}
    assert "1 images have no face in their name and are cropped without one (such as plain.png)" in caplog.text
    views(dataset(part, enable_bucket=True))
    assert "face_crop_aug_range has no effect with enable_bucket" in caplog.text
    only = folder("b", plain=(120, 90), shot_2023_10_12_5=(120, 90))
    with pytest.raises(UserError, match=r"face_crop_aug_range: no image in .* such as plain_120_80_64_64\.png"):
        views(dataset(subset(image_dir=only, face_crop_aug_range=(1.0, 2.0))))


def test_hue_is_turned_as_the_standard_library_says() -> None:
    rgb = np.random.default_rng(0).random((50, 3))
    rgb[:4] = [[0.5, 0.5, 0.5], [0, 0, 0], [1, 1, 1], [0.2, 0.7, 0.7]]
    for degrees in (-16.0, 7.0, 120.0):
        turned = turn_hue(rgb, degrees)
        for before, after in zip(rgb, turned, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            np.testing.assert_allclose(
                after, colorsys.hsv_to_rgb((hue + degrees / 360) % 1, saturation, value), atol=1e-6
            )


def test_gamma_leaves_black_and_white() -> None:
    pixels = np.array([[[0, 51, 255]]], np.uint8)
    np.testing.assert_allclose(apply_jitter(pixels, Jitter(gamma=1.05))[0, 0], [0, 255 * 0.2**1.05, 255], rtol=1e-6)
    assert str(Jitter(gamma=1.05)) == "gamma 1.050"
    assert str(Jitter(hue=-3.14)) == "hue -3.1°"


def test_a_third_of_the_draws_is_coloured_half_of_them_by_hue() -> None:
    drawn = [draw_jitter(random.Random(i)) for i in range(3000)]
    changed = [jitter for jitter in drawn if jitter is not None]
    assert 0.30 < len(changed) / 3000 < 0.36
    hues = [jitter.hue for jitter in changed if jitter.gamma == 1]
    gammas = [jitter.gamma for jitter in changed if jitter.hue == 0]
    assert len(hues) + len(gammas) == len(changed)
    assert 0.45 < len(hues) / len(changed) < 0.55
    for values, low, high in ((hues, -16, 16), (gammas, 0.95, 1.05)):
        assert low <= min(values) < low + (high - low) / 50
        assert high - (high - low) / 50 < max(values) <= high


def test_color_aug_reaches_the_pixels(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> None:
    part = subset(image_dir=folder("a", b=(64, 64)), num_repeats=60, color_aug=True)
    seen = views(dataset(part))
    jittered = [view for view in seen if view.jitter is not None]
    assert 8 < len(jittered) < 32
    plain = load_pixels(next(view for view in seen if view.jitter is None))
    for view in jittered:
        change = (load_pixels(view) - plain).abs() * 127.5
        assert 0 < change.mean() < 30
    rgb = np.asarray(Image.open(part.image_dir / "b.png"))
    assert view.jitter is not None
    expected = apply_jitter(rgb, view.jitter)
    np.testing.assert_allclose((load_pixels(view).permute(1, 2, 0).numpy() + 1) * 127.5, expected, atol=1e-3)


@pytest.mark.parametrize(
    "changes", [{"random_crop": True}, {"color_aug": True}, {"face_crop_aug_range": (1.0, 2.0)}], ids=str
)
def test_changing_images_cannot_be_cached(subset: MakeSubset, dataset: MakeDataset, changes: dict) -> None:
    spec = dataset(subset(), subset(**changes))
    name = next(iter(changes))
    with pytest.raises(UserError, match=f"^cache_latents and {name} exclude each other: .*data.toml, subset 1"):
        refuse_latent_cache_of_changing_images([spec])
    with pytest.raises(UserError, match=r"^cache_latents_to_disk and "):
        refuse_latent_cache_of_changing_images([spec], option="cache_latents_to_disk")
    refuse_latent_cache_of_changing_images([dataset(subset(flip_aug=True))])
    if name == "face_crop_aug_range":  # which has no effect in buckets
        refuse_latent_cache_of_changing_images([dataset(subset(**changes), enable_bucket=True)])
