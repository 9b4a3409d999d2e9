"""Noise of several resolutions, which is correlated over large areas.

Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training",
https://wandb.ai/johnowhitaker/multires_noise/reports/Multi-Resolution-Noise-for-Diffusion-Model-Training--VmlldzozNjYyOTU2
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from library.gpu import to_device


def add_resolutions(noise_CHW: Tensor, *, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """The noise and `iterations` more, each from a coarser grid, enlarged and times discount^i; of deviation 1 again.

    Grid i has sides of H / r^i and W / r^i, at least 1, with r drawn from 2 ... 4 for each; one of side 1 is the last.
    Grid 0 is as fine as the noise itself. The grids are drawn on the CPU, where `generator` is.
    """
    height, width = noise_CHW.shape[1:]
    for i in range(iterations):
        r = 2 + 2 * torch.rand((), generator=generator, dtype=torch.float64).item()
        grid = (max(1, int(height / r**i)), max(1, int(width / r**i)))
        coarse = to_device(torch.randn(1, len(noise_CHW), *grid, generator=generator), noise_CHW.device)
        noise_CHW = noise_CHW + nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0] * discount**i
        if 1 in grid:
            break
    return noise_CHW / noise_CHW.std()
