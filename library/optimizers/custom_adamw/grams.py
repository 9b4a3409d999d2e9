"""Grams: gradient descent with adaptive momentum scaling (Cao, Li, Song 2024, arXiv 2412.17107)."""

from __future__ import annotations

from torch import Tensor


def redirect(update: Tensor, grad: Tensor) -> Tensor:
    """sign(g) |u|: how far is the momentum's decision, which way is the gradient's."""
    return grad.sign() * update.abs()
