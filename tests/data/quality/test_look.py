"""An image's signature and blur: against their definitions, and that they find what they are meant to find."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from library.data.check import check_images
from library.data.quality.blur import BLURRED
from library.data.quality.look import UNIT, blur_effect, halvings, look_at, signature
from library.data.quality.near import NEAR, joined, near_groups

IMAGES = Path(__file__).parents[3] / "quickstart" / "images" / "validation"


@pytest.fixture(scope="module")
def shipped() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(IMAGES.glob("*.png"))[:60]]


def along_columns(gray: np.ndarray) -> float:
    """The formulas of the paper for one direction, pixel by pixel."""
    values, rows = gray.astype(float), len(gray)
    mean = np.stack([values[row - 4 : row + 5].mean(axis=0) for row in range(4, rows - 4)])
    sharp = np.abs(values[5 : rows - 4] - values[4 : rows - 5])
    smooth = np.abs(mean[1:] - mean[:-1])
    return float((sharp.sum() - np.maximum(0, sharp - smooth).sum()) / sharp.sum())


def crete(gray: np.ndarray) -> float:
    return max(along_columns(gray), along_columns(gray.T))


@pytest.mark.parametrize("shape", [(18, 18), (31, 40), (64, 20)])
def test_the_blur_is_that_of_the_paper(shape: tuple[int, int]) -> None:
    gray = np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)
    assert blur_effect(gray) == pytest.approx(crete(gray), rel=1e-12)
    assert blur_effect(gray) == blur_effect(gray.T) == blur_effect(gray[::-1, ::-1])


def test_a_large_image_is_measured_on_some_of_its_lines() -> None:
    gray = np.random.default_rng(1).integers(0, 256, (300, 520), dtype=np.uint8)
    columns, rows = along_columns(gray[:, ::4]), along_columns(gray[::2].T)
    assert blur_effect(gray) == pytest.approx(max(columns, rows), rel=1e-12)
    assert blur_effect(gray) == pytest.approx(crete(gray), rel=0.02)


def test_one_colour_is_blurred_and_a_tiny_image_is_not_judged() -> None:
    assert blur_effect(np.full((64, 64), 7, np.uint8)) == 1
    assert blur_effect(np.full((17, 64), 7, np.uint8)) == 0


def test_blurred_images_are_found(shipped: list[Image.Image]) -> None:
    def found(radius: float) -> int:
        images = [image.filter(ImageFilter.GaussianBlur(radius)) for image in shipped]
        return sum(look_at(image, full_size=image.size).blur >= BLURRED for image in images)

    assert found(0) == 0
    assert found(1.5) >= 0.9 * len(shipped)
    assert found(3) == len(shipped)


def test_a_signature_is_the_correlation_of_small_pictures(shipped: list[Image.Image]) -> None:
    small = [np.asarray(image.resize((8, 8), Image.Resampling.BOX), float).ravel() for image in shipped[:20]]
    signatures = np.stack([signature(image) for image in shipped[:20]]).astype(float)
    # each of the 192 numbers is rounded by at most a half, so a signature is off by at most 0.5 * 192 ** 0.5
    bound = 2 * (0.5 * 192**0.5) / UNIT
    assert np.abs(signatures @ signatures.T / UNIT**2 - np.corrcoef(small)).max() < bound
    assert not signature(Image.new("RGB", (30, 30), "red").convert("L").convert("RGB")).any()
    # all sums of products are whole numbers that float32 has exactly
    assert (np.abs(signatures) @ np.abs(signatures).T).max() < 2**24


def test_other_versions_of_an_image_are_near_it_and_other_images_are_not(shipped: list[Image.Image]) -> None:
    def saved(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=60)
        return Image.open(file).convert("RGB")

    versions = {
        "half": lambda image: image.resize((32, 32), Image.Resampling.LANCZOS),
        "larger": lambda image: image.resize((150, 150), Image.Resampling.BICUBIC),
        "JPEG": saved,
        "darker": ImageEnhance.Brightness,
        "paler": ImageEnhance.Contrast,
    }
    own = np.stack([signature(image) for image in shipped]).astype(float)
    for name, change in versions.items():
        changed = [
            made.enhance(0.85) if isinstance(made := change(image), ImageEnhance._Enhance) else made
            for image in shipped
        ]
        theirs = np.stack([signature(image) for image in changed])
        assert ((own * theirs).sum(axis=1) >= NEAR * UNIT**2).all(), name
    near = own @ own.T >= NEAR * UNIT**2
    assert near.sum() - len(own) <= 2 * 1, "one pair of faces at most"


@pytest.mark.parametrize(("size", "times"), [((64, 64), 0), ((1023, 5000), 0), ((1024, 1024), 1), ((4000, 3000), 2)])
def test_large_images_are_halved(size: tuple[int, int], times: int) -> None:
    assert halvings(size) == times
    shorter = min(size) >> times
    assert shorter < 1024
    assert not times or shorter >= 512


def test_a_jpeg_looks_the_same_decoded_small_or_whole(tmp_path: Path, shipped: list[Image.Image]) -> None:
    path = tmp_path / "large.jpg"
    shipped[0].resize((1100, 1300), Image.Resampling.BICUBIC).save(path, quality=95)
    one, other = (check_images([path], contents=contents)[0][path] for contents in (False, True))
    assert one.size == other.size == (1100, 1300)
    assert one.look.blur == pytest.approx(other.look.blur, abs=0.01)
    assert np.abs(one.look.signature - other.look.signature).max() <= 4


@pytest.mark.parametrize("least", [0.8, 0.9, 0.97])
def test_groups_are_the_connected_ones(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.data.quality.near.BLOCK", 37)
    values = np.random.default_rng(1).normal(size=(200, 6))
    values = np.rint(UNIT * values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.int16)
    values[50] = 0  # of one colour: near to nothing, not even to itself
    wide = values.astype(int)
    pairs = [(i, j) for i in range(200) for j in range(i) if wide[i] @ wide[j] >= least * UNIT**2]
    expected = joined(pairs)
    assert len(expected) >= 3
    assert near_groups(values, least=least) == sorted(expected)


def test_joined_groups_have_every_member_once() -> None:
    assert joined([[5, 3], [1, 2], [3, 1], [7, 8]]) == [[1, 2, 3, 5], [7, 8]]
    assert joined([]) == []
