"""AGR: adaptive gradient regularization (Jiang et al. 2024, arXiv 2407.16944)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..setting import setting
from ..technique import About, Step, Technique

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AGR(Technique):
    """Shrinks the entries that dominate their tensor's gradient."""

    use_agr: bool = setting(True, help="shrink the entries that dominate a gradient")

    name = "AGR"
    papers = ("2407.16944",)

    def applies(self, about: About) -> bool:
        return about.numel > 1  # a single number is all of its gradient: AGR would set its update to zero

    def gradient(self, g: Tensor, step: Step) -> Tensor:
        return regularize(g)


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
