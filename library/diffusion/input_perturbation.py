"""Additional noise in the network's input but not in its target: it imitates the network's errors in sampling."""

from __future__ import annotations

from torch import Tensor


def perturb(noise_BCHW: Tensor, normal_BCHW: Tensor, gamma: Tensor) -> Tensor:
    """eps + gamma · xi, for x_t only; the target keeps eps (Ning et al. 2023, arXiv 2301.11706, algorithm 1)."""
    return noise_BCHW + gamma * normal_BCHW
