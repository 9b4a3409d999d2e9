"""TAM: torque-aware momentum (Malviya et al. 2024, arXiv 2412.18790).

    S_t = <m_{t-1}, g_t> / (||m_{t-1}|| ||g_t||);  s_t = gamma s_{t-1} + (1 - gamma) S_t;  d_t = (1 + s_t) / 2
    m_t = b1 m_{t-1} + (1 - b1) (eps + d_t) g_t

One number per tensor. Deviation: the paper's momentum has no factor (1 - b1); here it stays Adam's average, so that
d = 1 is AdamW. With ADOPT, its normalised gradient takes the place of g.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8


def alignment(exp_avg: Tensor, grad: Tensor) -> Tensor:
    """S [k, 1], the cosine of the previous momentum and the gradient for rows [k, n]; 0 where either is zero."""
    dot = (exp_avg * grad).sum(-1, keepdim=True)
    lengths = torch.linalg.vector_norm(exp_avg, dim=-1, keepdim=True)
    lengths = lengths * torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
    return dot / lengths.where(lengths > 0, 1)


def smooth(s: Tensor, alignment: Tensor, gamma: float) -> Tensor:
    """s_t = gamma s_{t-1} + (1 - gamma) S_t."""
    return gamma * s + (1 - gamma) * alignment


def unbias(s: Tensor, gamma: float, t: Tensor | float) -> Tensor:
    """s_t / (1 - gamma^t): with it a gamma of 0.999 does not begin with a thousand halved steps."""
    return s / (1 - gamma**t)


def damping(s: Tensor) -> Tensor:
    """d = (1 + s) / 2: 1 for a gradient along the momentum, 0 against it."""
    return (1 + s) / 2
