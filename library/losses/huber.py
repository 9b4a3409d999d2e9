"""Pseudo-Huber losses, and the dependence of their threshold on the noise.

Khrapov et al. 2024, arXiv 2403.16728: near 0 such a loss is quadratic, beyond the threshold c linear, so that a wrong
image in the data has less effect. A threshold that decreases with the noise keeps l2's details at low noise.
The scales of both losses and of the schedules are those of kohya's scripts.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEDULES = ("constant", "exponential", "snr")


def pseudo_huber(prediction: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """2 c (sqrt(d² + c²) - c) with d = prediction - target, per element: d² for d « c, 2 c |d| for d » c.

    `c` above 0, of a shape that fits the others': [B, 1, 1, 1].
    """
    return c * smooth_l1(prediction, target, c)


def smooth_l1(prediction: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """2 (sqrt(d² + c²) - c), per element: d² / c for d « c, 2 |d| for d » c. `c` as for `pseudo_huber`."""
    return 2 * (torch.sqrt((prediction - target).square() + c.square()) - c)


def thresholds(schedule: str, snr_B: Tensor, share_B: Tensor, *, c: float, scale: float) -> Tensor:
    """The threshold at noise levels of these signal-to-noise ratios, [B].

    share_B: where a level lies between the least noise, 0, and the most, 1.
    constant: c · scale. exponential: c^share · scale, from `scale` down to c · scale. snr: (1 - c) / (1 + sigma)² + c
    with sigma = 1 / sqrt(SNR), from nearly 1 down to c where there is no signal; `scale` is not in kohya's formula and
    has no effect there.
    """
    assert schedule in SCHEDULES, schedule
    if schedule == "constant":
        return torch.full_like(snr_B, c * scale)
    if schedule == "exponential":
        return c**share_B * scale
    return (1 - c) / (1 + snr_B.rsqrt()).square() + c
