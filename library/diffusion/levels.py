"""Distributions of the noise level of a training sample, over 0 (no noise) ... 1 (only noise). A process maps them to
its own levels (`Process.draw`).

logit_normal and mode are those of Esser et al. 2024, arXiv 2403.03206, §3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Density = Callable[[torch.Generator], float]


def shifted(u: float, *, shift: float) -> float:
    """shift · u / (1 + (shift - 1) u), in 0 ... 1 as u: nearer to 1 for a shift above 1 (arXiv 2403.03206, §5.3.2)."""
    return shift * u / (1 + (shift - 1) * u)


def shifted_density(density: Density, generator: torch.Generator, *, shift: float) -> float:
    """A draw of `density`, shifted."""
    return shifted(density(generator), shift=shift)


def uniform(generator: torch.Generator) -> float:
    """Uniform in 0 ... 1."""
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def logit_normal(generator: torch.Generator, *, mean: float, std: float) -> float:
    """1 / (1 + exp(-z)) with z normal: densest around z = mean, never at the ends."""
    z = mean + std * torch.randn((), generator=generator, dtype=torch.float64)
    return torch.sigmoid(z).item()


def mode(generator: torch.Generator, *, scale: float) -> float:
    """1 - u - scale (cos²(pi u / 2) - 1 + u) with u uniform: most in the middle for a scale above 0, least below.

    It stays in 0 ... 1 for scales of -1 ... 2 / (pi - 2) = 1.75.
    """
    u = uniform(generator)
    return min(max(1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u), 0.0), 1.0)
