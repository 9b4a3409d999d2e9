"""The noise of a step: its kinds, and its random draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.diffusion.draws import generator, stacked_normal, stacked_shares
from library.diffusion.input_perturbation import perturb
from library.diffusion.multires_noise import add_resolutions
from library.diffusion.noise_offset import adaptive_strength, add_offset
from library.gpu import to_device

if TYPE_CHECKING:
    from library.data.dataset import Draw


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The additions to plain noise; 0 is off. `random`: each image has that strength times a random factor in 0 … 1."""

    offset: float = 0.0
    offset_random: bool = False
    adaptive_scale: float = 0.0  # of the offset
    resolutions: int = 0
    discount: float = 0.3
    perturbation: float = 0.0
    perturbation_random: bool = False


def draw_noise(noise: Noise, latents_BCHW: Tensor, seed: int, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """(the noise to predict, the noise added to the latents): each [B, C, h, w] in fp32 on the latents' device.

    They differ only by the perturbation.
    """
    device, shape = latents_BCHW.device, latents_BCHW.shape[1:]
    eps = to_device(stacked_normal(shape, seed, draws, "noise"), device)
    if noise.offset:
        strength = _strength(noise.offset, noise.offset_random, seed, draws, "noise_offset_strength")
        strength = to_device(strength, device)
        if noise.adaptive_scale:
            strength = adaptive_strength(strength, latents_BCHW, scale=noise.adaptive_scale)
        moved = to_device(stacked_normal((shape[0], 1, 1), seed, draws, "noise_offset"), device)
        eps = add_offset(eps, moved, strength)
    if noise.resolutions:
        eps = torch.stack(
            [
                add_resolutions(
                    one,
                    iterations=noise.resolutions,
                    discount=noise.discount,
                    generator=generator(seed, draw, "multires_noise"),
                )
                for one, draw in zip(eps, draws, strict=True)
            ]
        )
    if not noise.perturbation:
        return eps, eps
    gamma = _strength(noise.perturbation, noise.perturbation_random, seed, draws, "ip_noise_strength")
    added = to_device(stacked_normal(shape, seed, draws, "ip_noise"), device)
    return eps, perturb(eps, added, to_device(gamma, device))


def _strength(most: float, random: bool, seed: int, draws: Sequence[Draw], purpose: str) -> Tensor:
    """[B, 1, 1, 1] or one number."""
    return stacked_shares(seed, draws, purpose) * most if random else torch.tensor(most)
