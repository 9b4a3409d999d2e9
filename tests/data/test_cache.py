"""Encoded once, in batches of one size; what comes out is what went in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.data.caches.memory import encode_captions, encode_images
from library.data.images import View, load_pixels
from library.errors import UserError

MakeFolder = Callable[..., Path]


class Encoder:
    """A stand-in for a VAE of factor 4 in half precision, which notes what it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        assert pixels.dtype == torch.float32
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(pixels.shape))
        mean = torch.nn.functional.avg_pool2d(pixels, 4).half()
        return mean, mean.abs() / 2


@pytest.fixture
def views(folder: MakeFolder) -> list[View]:
    path = folder("images", a=(16, 16), b=(16, 16), c=(16, 16), d=(16, 24), e=(40, 40))
    sizes = {"a": (16, 16), "b": (16, 16), "c": (16, 16), "d": (16, 24), "e": (16, 24)}
    return [View(path / f"{stem}.png", size, (0, 0), size, False) for stem, size in sizes.items()]


def test_each_view_once_in_batches_of_one_size(views: list[View]) -> None:
    encoder = Encoder()
    mirrored = [replace(view, flip=True) for view in views[:1]]
    cache = encode_images([*views, *views, *mirrored], encoder, batch_size=3)
    assert encoder.shapes == [(3, 3, 16, 16), (1, 3, 16, 16), (2, 3, 24, 16)]
    assert cache.nbytes == 2 * 2 * 3 * (4 * 4 * 4 + 2 * 6 * 4)
    mean, std = cache.get([views[2], mirrored[0], views[2]])
    assert mean.shape == (3, 3, 4, 4)
    assert mean.dtype == torch.float16
    with torch.no_grad():
        expected_mean, expected_std = encoder(torch.stack([load_pixels(v) for v in (views[2], mirrored[0], views[2])]))
    torch.testing.assert_close(mean, expected_mean)  # encoded in other batches
    torch.testing.assert_close(std, expected_std)
    assert cache.get(views[3:])[0].shape == (2, 3, 6, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_latents_that_are_no_numbers_name_the_image(views: list[View], value: float, which: int) -> None:
    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        moments = torch.zeros(len(pixels), 4, 4, 4), torch.zeros(len(pixels), 4, 4, 4)
        moments[which][1, 2, 3, 0] = value
        return moments

    with pytest.raises(UserError, match=r"not finite for [^,]*b\.png: .*--no_half_vae"):
        encode_images(views[:3], encode, batch_size=3)


def test_an_image_that_vanished_is_named(views: list[View]) -> None:
    views[4].path.unlink()
    with pytest.raises(UserError, match=r"e\.png"):
        encode_images(views, Encoder(), batch_size=2)


def test_few_images_are_held_while_the_encoder_is_slow(views: list[View], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = 0

    def counting(view: View) -> Tensor:
        nonlocal loaded
        loaded += 1
        return load_pixels(view)

    monkeypatch.setattr("library.data.caches.memory.load_pixels", counting)
    monkeypatch.setattr("library.data.caches.memory.thread_count", lambda: 2)
    held: list[int] = []

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        held.append(loaded - 2 * len(held))
        return pixels, pixels

    many = [replace(views[0], crop=(0, 0), size=(8, 8), resized=(8 + i, 8 + i)) for i in range(40)]
    encode_images(many, encode, batch_size=2)
    assert len(held) == 20
    assert max(held) <= 2 + 2 * 2 + 2


def test_captions_once_and_in_batches() -> None:
    asked: list[list[str]] = []

    def encode(captions: list[str]) -> dict[str, Tensor]:
        asked.append(captions)
        lengths = torch.tensor([[float(len(caption))] * 3 for caption in captions])
        return {"hidden_states": lengths.bfloat16(), "mask": lengths.long()}

    cache = encode_captions(["a", "bb", "a", "", "dddd"], encode, batch_size=3)
    assert asked == [["a", "bb", ""], ["dddd"]]
    assert cache.nbytes == 4 * 3 * (2 + 8)
    found = cache.get(["dddd", "", "dddd"])
    assert found["hidden_states"].dtype == torch.bfloat16
    assert found["mask"].tolist() == [[4] * 3, [0] * 3, [4] * 3]
