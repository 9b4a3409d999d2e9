"""ADOPT: modified Adam that converges with any beta2 (Taniguchi et al., NeurIPS 2024, arXiv 2411.02853).

The clipped version of November 2024. v starts as the square of the first gradient, and that call moves nothing; from
then on the gradient is divided by the root of the *previous* v, clipped, and only then enters the momentum:

    g^ = clip(g / max(sqrt(v_{k-1}), eps), -k^(1/4), k^(1/4));  m_k = b1 m_{k-1} + (1-b1) g^;  w <- w - lr m_k
    v_k = b2 v_{k-1} + (1-b2) g^2

Deviation: v is seeded by the first gradient that is not all zero, tensor by tensor. The gradient of lora_down is
exactly zero at the first step of a LoRA (lora_up = 0); seeding with it would leave eps as the only denominator.
"""

from __future__ import annotations

from torch import Tensor


def normalize(grad: Tensor, exp_avg_sq: Tensor, k: Tensor, *, eps: float, clip: float) -> Tensor:
    """g^ for rows [k, n]: `exp_avg_sq` is the previous second moment, `k` [k, 1] counts the updates from 1.

    `eps` is a floor and not an addend; the bound is k ** clip.
    """
    bound = k.clamp(min=1) ** clip
    return (grad / exp_avg_sq.sqrt().clamp(min=eps)).clamp(-bound, bound)


def is_seeded(k: Tensor) -> Tensor:
    """Whether a row has seen a non-zero gradient in an earlier step; k [k, 1]."""
    return k > 0


def count(k: Tensor, grad: Tensor) -> Tensor:
    """The next k: 0 until the first non-zero gradient, 1 when that has seeded v, then one more at each update."""
    return k + (is_seeded(k) | (grad != 0).any(-1, keepdim=True))
