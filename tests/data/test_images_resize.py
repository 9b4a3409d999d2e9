"""Resizing with each of kohya's filters, against OpenCV and Pillow, which it uses."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from library.config.options import declared_options
from library.data.resize import resize

FILTERS = declared_options()["resize_interpolation"].choices
SOURCE = np.array([[0, 7, 28, 63, 112], [175, 252, 87, 192, 55], [188, 79, 240, 159, 92], [39, 0, 231, 220, 223]])
# cv2.resize of opencv-python-headless 5.0.0 with INTER_LINEAR, INTER_CUBIC, INTER_AREA and INTER_NEAREST_EXACT
OPENCVS = {
    ("bilinear", (3, 2)): [[101, 58, 98], [89, 236, 168]],
    ("bilinear", (7, 5)): [
        [0, 4, 13, 28, 53, 84, 112],
        [123, 154, 147, 69, 129, 118, 72],
        [182, 172, 165, 164, 172, 132, 74],
        [143, 93, 107, 237, 194, 157, 131],
        [39, 17, 66, 231, 223, 221, 223],
    ],
    ("bicubic", (3, 2)): [[111, 43, 101], [73, 250, 165]],
    ("bicubic", (7, 5)): [
        [0, 0, 0, 24, 42, 84, 120],
        [119, 186, 167, 54, 135, 132, 60],
        [213, 205, 187, 170, 191, 130, 46],
        [157, 61, 87, 254, 208, 147, 129],
        [33, 0, 54, 230, 235, 226, 232],
    ],
    ("area", (3, 2)): [[104, 86, 101], [84, 187, 170]],
    ("area", (7, 5)): [
        [0, 4, 11, 28, 56, 83, 112],
        [131, 167, 167, 72, 142, 123, 69],
        [182, 172, 165, 164, 173, 135, 74],
        [151, 96, 95, 238, 187, 154, 125],
        [39, 16, 46, 231, 222, 221, 223],
    ],
    ("nearest", (3, 2)): [[175, 87, 55], [39, 231, 223]],
    ("nearest", (7, 5)): [
        [0, 7, 7, 28, 63, 63, 112],
        [175, 252, 252, 87, 192, 192, 55],
        [188, 79, 79, 240, 159, 159, 92],
        [188, 79, 79, 240, 159, 159, 92],
        [39, 0, 0, 231, 220, 220, 223],
    ],
}


def gray() -> Image.Image:
    return Image.fromarray(SOURCE.astype(np.uint8))


@pytest.mark.parametrize(("interpolation", "size"), OPENCVS)
def test_opencvs_filters_up_to_its_rounding(interpolation: str, size: tuple[int, int]) -> None:
    ours = resize(gray(), size, interpolation)
    # OpenCV weighs with 11 bits and rounds to whole numbers
    assert np.abs(ours.astype(np.float64) - OPENCVS[interpolation, size]).max() < 1


@pytest.mark.parametrize("size", [(3, 2), (7, 5)])
def test_pillows_filters_are_pillows(size: tuple[int, int]) -> None:
    for name, filter in (("lanczos", Image.Resampling.LANCZOS), ("box", Image.Resampling.BOX)):
        np.testing.assert_array_equal(resize(gray(), size, name), np.asarray(gray().resize(size, filter)))


@pytest.mark.parametrize("size", [(3, 2), (7, 5), (5, 4), (1, 9)])
def test_every_filter_gives_the_size_channels_and_range(size: tuple[int, int]) -> None:
    rgb = Image.merge("RGB", [gray(), gray().transpose(Image.Transpose.FLIP_LEFT_RIGHT), gray()])
    for name in (*FILTERS, None):
        pixels = resize(rgb, size, name)
        assert pixels.shape == (size[1], size[0], 3), name
        assert pixels.min() >= 0, name
        assert pixels.max() <= 255.001, name
        np.testing.assert_allclose(pixels[..., 0], resize(gray(), size, name), atol=1e-3)


def test_two_names_for_one_filter() -> None:
    for one, other in (("linear", "bilinear"), ("cubic", "bicubic")):
        np.testing.assert_array_equal(resize(gray(), (7, 5), one), resize(gray(), (7, 5), other))


def test_the_default_is_area_to_shrink_and_lanczos_to_enlarge() -> None:
    for size, name in (((3, 2), "area"), ((5, 2), "area"), ((7, 5), "lanczos"), ((3, 5), "lanczos")):
        np.testing.assert_array_equal(resize(gray(), size), resize(gray(), size, name))
