"""Colour augmentation: a third of the draws get a slightly other hue or brightness."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

SHARE = 0.33  # of draws that are changed at all
LARGEST_TURN = 16.0  # degrees of hue; kohya's 8 are OpenCV's, which has 180 to a circle
LARGEST_GAMMA = 0.05  # away from 1


@dataclass(frozen=True)
class Jitter:
    """The change of colours in one sight of an image: the hue turned by degrees, or brightness ** gamma."""

    hue: float = 0.0
    gamma: float = 1.0

    def __str__(self) -> str:
        return f"hue {self.hue:+.1f}°" if self.hue else f"gamma {self.gamma:.3f}"


def draw_jitter(rng: random.Random) -> Jitter | None:
    """kohya's chances: a third of the draws, half of these the hue, half the gamma, each evenly over its range."""
    if rng.random() > SHARE:
        return None
    if rng.random() > 0.5:
        return Jitter(hue=rng.uniform(-LARGEST_TURN, LARGEST_TURN))
    return Jitter(gamma=rng.uniform(1 - LARGEST_GAMMA, 1 + LARGEST_GAMMA))


def apply_jitter(pixels: np.ndarray, jitter: Jitter) -> np.ndarray:
    """[H, W, 3] in 0 … 255 → float32 of the same shape and range.

    Gamma is 255 · (v / 255) ** gamma, so black and white stay what they are.
    """
    unit = np.clip(pixels, 0, 255).astype(np.float32) / 255
    if jitter.hue:
        unit = turn_hue(unit, jitter.hue)
    return 255 * unit ** np.float32(jitter.gamma)


def turn_hue(rgb: np.ndarray, degrees: float) -> np.ndarray:
    """[..., 3] in 0 … 1 with the hue of HSV turned by `degrees`; saturation and value stay.

    Forward (Smith 1978): with V = max, C = V - min, the hue in sixths of a circle is (G - B) / C, 2 + (B - R) / C or
    4 + (R - G) / C, as R, G or B is the largest. Back: channel n in (5, 3, 1) is V - C · clip(min(k, 4 - k), 0, 1)
    with k = (n + hue) mod 6.
    """
    red, green, blue = np.moveaxis(rgb, -1, 0)
    value = rgb.max(-1)
    chroma = value - rgb.min(-1)
    safe = np.where(chroma > 0, chroma, 1)  # grey has no hue
    hue = np.where(
        value == red,
        (green - blue) / safe,
        np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = hue + np.float32(degrees / 60)
    channels = []
    for n in (5, 3, 1):
        k = (n + hue) % 6
        channels.append(value - chroma * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.stack(channels, -1)
