"""Absolute error."""

from __future__ import annotations

from torch import Tensor


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """|prediction - target|, per element, in the precision of the inputs."""
    return (prediction - target).abs()
