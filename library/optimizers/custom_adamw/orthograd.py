"""perpGrad, also called OrthoGrad (Prieto et al. 2025, arXiv 2501.04697)."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30


def project(weight: Tensor, grad: Tensor) -> Tensor:
    """The part of `grad` that is orthogonal to `weight`, brought back to the length of `grad`; rows of [k, n].

        g_perp = g - <w,g> / (<w,w> + 1e-30) w;   g <- g_perp ||g|| / (||g_perp|| + 1e-30)

    The rescaling is the official code's, the paper's equation has none. A gradient parallel to its weight leaves only
    round-off behind, which the rescaling would blow up to full length: such a row becomes zero instead.
    """
    along = (weight * grad).sum(-1, keepdim=True) / ((weight * weight).sum(-1, keepdim=True) + TINY)
    orthogonal = grad - along * weight
    length = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
    rest = torch.linalg.vector_norm(orthogonal, dim=-1, keepdim=True)
    return orthogonal * (length / (rest + TINY)).where(rest > round_off(grad) * length, 0)


def round_off(grad: Tensor) -> float:
    """What a parallel gradient leaves of its length after the projection, at most: four units in the last place."""
    return 4 * torch.finfo(grad.dtype).eps
