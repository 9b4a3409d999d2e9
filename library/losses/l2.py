"""Squared error."""

from __future__ import annotations

from torch import Tensor


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """(prediction - target)², per element, in the precision of the inputs."""
    return (prediction - target).square()
