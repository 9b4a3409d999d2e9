"""Cautious optimizers (Liang, Chen, Liu, Liu 2024, arXiv 2411.16085)."""

from __future__ import annotations

from torch import Tensor


def agreement(update: Tensor, grad: Tensor) -> Tensor:
    """1 where u g > 0, else 0; rows [k, n]. Signs, not products: those of two small numbers vanish in float32."""
    return (update.sign() * grad.sign() > 0).to(update.dtype)


def mask(update: Tensor, grad: Tensor, *, least: float) -> Tensor:
    """u mask / max(mean(mask), least): what disagrees with the gradient stands still, the rest moves further.

    The scale of the authors' code (the paper's first version has n / (sum + 1)). The moments are not masked.
    """
    agree = agreement(update, grad)
    return update * (agree / agree.mean(-1, keepdim=True).clamp(min=least))
