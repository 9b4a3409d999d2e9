"""Every mode that Pillow reads, and the files that it cannot read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from library.data.check import check_images, report_bad_images
from library.data.images import View, image_extensions, load_pixels, open_image, orientation, resize, to_rgb
from library.errors import UserError


def seen(path: Path, size: tuple[int, int] | None = None, *, flip: bool = False) -> np.ndarray:
    """[H, W, 3] in 0 … 255."""
    sizes, bad = check_images([path])
    assert not bad
    whole = sizes[path].size
    pixels = load_pixels(View(path, size or whole, (0, 0), size or whole, flip))
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    return (pixels.permute(1, 2, 0).numpy() + 1) * 127.5


def ramp(width: int = 6, height: int = 4) -> np.ndarray:
    values = np.arange(width * height * 3).reshape(height, width, 3)
    return (values * 255 // values.max()).astype(np.uint8)


def test_rgb_png_comes_back_exactly(tmp_path: Path) -> None:
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    np.testing.assert_allclose(seen(tmp_path / "a.png"), ramp(), atol=1e-4)
    np.testing.assert_allclose(seen(tmp_path / "a.png", flip=True), ramp()[:, ::-1], atol=1e-4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_exif_orientation(tmp_path: Path, orientation: int, extension: str) -> None:
    corner = np.zeros((32, 48, 3), np.uint8)
    corner[:16, :16] = 255  # top left of what the camera stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{extension}"
    Image.fromarray(corner).save(path, exif=exif)
    pixels = seen(path)
    turned = [corner, corner[:, ::-1], corner[::-1, ::-1], corner[::-1]]  # EXIF 2.3, table for tag 0x0112
    turned += [
        corner.transpose(1, 0, 2),
        np.rot90(corner, -1),
        np.rot90(corner, 2).transpose(1, 0, 2),
        np.rot90(corner),
    ]
    assert pixels.shape == turned[orientation - 1].shape
    assert np.abs(pixels - turned[orientation - 1]).max() < 20  # JPEG


def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png") as image:
        assert image.mode == "I;16"
    np.testing.assert_allclose(seen(tmp_path / "a.png")[0, :, 0], [0, 1, 128, 255], atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I", [0, 257, 65535], [0, 1, 255]),
        ("I", [0, 2**30, 2**31 - 1], [0, 128, 255]),
        ("F", [0.0, 0.5, 1.0], [0, 128, 255]),
        ("F", [-3.0, 100.0, 255.0], [0, 100, 255]),
        ("F", [0.0, 257.0, 65535.0], [0, 1, 255]),
    ],
)
def test_wide_gray_takes_the_least_scale_that_holds_it(mode: str, values: list, expected: list[int]) -> None:
    array = np.array([values], np.int32 if mode == "I" else np.float32)
    image = Image.fromarray(array)
    assert image.mode == mode
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == expected


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.abs(seen(tmp_path / "rgba.png")[0] - [[200, 0, 0], [255, 255, 255], [244, 204, 204]]).max() <= 1

    gray = np.array([[[90, 255], [90, 0]]], np.uint8)
    Image.fromarray(gray, mode="LA").save(tmp_path / "la.png")
    np.testing.assert_allclose(seen(tmp_path / "la.png")[0, :, 0], [90, 255], atol=1e-4)

    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png", transparency=1)
    np.testing.assert_allclose(seen(tmp_path / "p.png")[0], [[10, 20, 30], [255, 255, 255]], atol=1e-4)

    Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8)).save(tmp_path / "rgb.png", transparency=(9, 9, 9))
    np.testing.assert_allclose(seen(tmp_path / "rgb.png")[0], [[1, 2, 3], [255, 255, 255]], atol=1e-4)

    wide = Image.fromarray(np.array([[514, 7 * 257]], np.uint16))
    wide.save(tmp_path / "i16.png", transparency=7 * 257)
    np.testing.assert_allclose(seen(tmp_path / "i16.png")[0, :, 0], [2, 255], atol=1e-4)


def test_one_bit_cmyk_and_palette_alpha(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "1.png")
    np.testing.assert_allclose(seen(tmp_path / "1.png")[0, :, 1], [0, 255], atol=1e-4)

    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    with open_image(tmp_path / "cmyk.jpg") as image:
        assert image.mode == "CMYK"
    assert np.abs(seen(tmp_path / "cmyk.jpg") - [255, 0, 0]).max() < 4

    Image.new("PA", (2, 2)).convert("RGBA").save(tmp_path / "pa.webp", lossless=True)
    assert seen(tmp_path / "pa.webp").min() > 254  # wholly transparent


@pytest.mark.parametrize("extension", sorted(image_extensions() - {".jxl"}))
def test_each_extension_is_read(tmp_path: Path, extension: str) -> None:
    for width, height in ((64, 48), (5, 3)):
        Image.new("RGB", (width, height), (250, 128, 10)).save(tmp_path / f"a{extension}")
        pixels = seen(tmp_path / f"a{extension}")
        assert pixels.shape == (height, width, 3)
        assert np.abs(pixels - [250, 128, 10]).max() < 8


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.webp", lossless=True)
    (tmp_path / "a.webp").rename(tmp_path / "a.png")
    assert np.abs(seen(tmp_path / "a.png") - [255, 0, 0]).max() < 1


def test_first_frame_of_an_animation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "b.png", save_all=True, append_images=frames[1:])
    for name in ("a.webp", "b.png"):
        assert np.abs(seen(tmp_path / name) - [255, 0, 0]).max() < 1
    check_images([tmp_path / "a.webp", tmp_path / "b.png"])
    assert "2 animated images" in caplog.text


def test_a_phones_photo_with_its_preview_is_no_animation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photo, preview = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (8, 8), "blue")
    photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    assert np.abs(seen(tmp_path / "a.jpg") - [255, 0, 0]).max() < 4
    assert not caplog.text


def test_area_when_shrinking_is_the_exact_mean(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8))
    # Each column three times and each row four times, so that whole ones make up a new one: 50·3 = 30·5, 70·4 = 40·7.
    fine = np.asarray(image, np.float64).repeat(4, axis=0).repeat(3, axis=1)
    expected = fine.reshape(40, 7, 30, 5, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(resize(image, (30, 40)), expected, atol=1e-3)


def test_white_stays_within_its_range(tmp_path: Path) -> None:
    Image.new("RGB", (601, 733), "white").save(tmp_path / "a.png")
    assert seen(tmp_path / "a.png", (512, 624)).min() > 254.99


def test_lanczos_when_anything_grows(tmp_path: Path) -> None:
    image = Image.fromarray(ramp(20, 10))
    for size in ((40, 20), (40, 8)):
        np.testing.assert_array_equal(resize(image, size), np.asarray(image.resize(size, Image.Resampling.LANCZOS)))
    np.testing.assert_array_equal(resize(image, (20, 10)), ramp(20, 10))


def test_crop_is_taken_before_the_flip(tmp_path: Path) -> None:
    Image.fromarray(ramp(10, 8)).save(tmp_path / "a.png")
    view = View(tmp_path / "a.png", (10, 8), (3, 2), (4, 5), False)
    expected = ramp(10, 8)[2:7, 3:7]
    for flip in (False, True):
        pixels = (load_pixels(replace(view, flip=flip)).permute(1, 2, 0).numpy() + 1) * 127.5
        np.testing.assert_allclose(pixels, expected[:, ::-1] if flip else expected, atol=1e-4)


def test_offset_of_a_flipped_view_counts_from_the_other_side() -> None:
    assert View(Path("a"), (11, 8), (3, 0), (4, 8), False).offset == (3, 0)
    assert View(Path("a"), (11, 8), (3, 0), (4, 8), True).offset == (4, 0)


def broken_files(folder: Path) -> dict[str, str]:
    """Files that cannot be read: name → part of the reason."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    for extension in ("jpg", "png", "webp"):
        Image.fromarray(noise).save(folder / f"whole.{extension}")
        data = (folder / f"whole.{extension}").read_bytes()
        (folder / f"truncated.{extension}").write_bytes(data[: len(data) * 9 // 10])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "program.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    )  # nothing runs Ghostscript
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(folder / "nan.tiff")
    (folder / "nan.tiff").rename(folder / "nan.png")
    return {
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "truncated.webp": "",
        "empty.png": "empty",
        "text.png": "version https://git-lfs",
        "gone.png": "no such file",
        "program.png": "not an image",
        "nan.png": "are NaN",
    }


def test_every_unreadable_image_is_found(tmp_path: Path) -> None:
    reasons = broken_files(tmp_path)
    sizes, bad = check_images(sorted(path for path in tmp_path.iterdir()))
    assert set(sizes) == {tmp_path / "whole.jpg", tmp_path / "whole.png", tmp_path / "whole.webp"}
    assert {one.size for one in sizes.values()} == {(400, 400)}
    assert {path.name for path in bad} == set(reasons)
    for name, reason in reasons.items():
        assert reason in bad[tmp_path / name], name
        with pytest.raises(UserError, match=name):
            load_pixels(View(tmp_path / name, (8, 8), (0, 0), (8, 8), False))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest resets the filters
def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (200, 100)).save(tmp_path / "large.png")
    Image.new("L", (100, 100)).save(tmp_path / "small.png")
    for limit in (19_999, 5_000):  # Pillow warns up to twice its limit and refuses beyond
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        _, bad = check_images([tmp_path / "large.png"])
        assert f"more than {limit} pixels" in bad[tmp_path / "large.png"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    assert not check_images([tmp_path / "large.png"])[1]


def test_jpeg_xl_is_turned_by_its_decoder_alone() -> None:
    image = Image.new("RGB", (8, 8))
    image.getexif()[0x0112] = 6
    assert orientation(image) == 6
    image.format = "JXL"
    assert orientation(image) == 1
    image.jpeg = True  # pillow_jxl's mark of a JPEG that is kept within
    assert orientation(image) == 6


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*no directory", b"Exif\0\0rubbish", b"Exif\0\0MM\0*", b"E"])
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_a_broken_exif_block_does_not_cost_the_image(tmp_path: Path, exif: bytes, extension: str) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / f"a.{extension}", exif=exif)
    assert seen(tmp_path / f"a.{extension}").shape == (8, 8, 3)


@pytest.mark.parametrize("packed", [False, True])
def test_large_text_in_a_png_does_not_cost_the_image(tmp_path: Path, packed: bool) -> None:
    """Image generators write their whole workflow there."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=packed)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", pnginfo=info)
    assert seen(tmp_path / "a.png").shape == (8, 8, 3)


def test_the_error_lists_twenty_and_counts_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    bad = {Path(f"{number}.png"): f"reason {number}" for number in range(23)}
    with pytest.raises(UserError, match="23 unreadable images") as error:
        report_bad_images(bad, skip=False)
    assert "19.png: reason 19" in str(error.value)
    assert "20.png" not in str(error.value)
    assert "and 3 more" in str(error.value)
    assert "--skip_bad_images" in str(error.value)
    report_bad_images(bad, skip=True)
    assert "23 unreadable images are left out" in caplog.text
    report_bad_images({}, skip=False)


def test_quickstart_images(train_images: Path) -> None:
    paths = sorted(train_images.glob("*.png"))
    sizes, bad = check_images(paths)
    assert len(sizes) == len(paths) == 160
    assert not bad
    assert {one.size for one in sizes.values()} == {(64, 64)}
