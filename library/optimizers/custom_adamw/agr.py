"""AGR: adaptive gradient regularization (Jiang et al. 2024, arXiv 2407.16944)."""

from __future__ import annotations

from torch import Tensor


def alpha(grad: Tensor) -> Tensor:
    """alpha_i = |g_i| / sum_j |g_j| for each row of `grad` [k, n]; an all-zero row gets zeros.

    The published code divides 0 by 0 there, and lora_down has an all-zero gradient at the first step of every LoRA.
    """
    size = grad.abs()
    total = size.sum(-1, keepdim=True)
    return size / total.where(total > 0, 1)


def regularize(grad: Tensor) -> Tensor:
    """g (1 - alpha(g)): shrinks the entries that dominate their tensor, keeps every sign."""
    return grad * (1 - alpha(grad))
