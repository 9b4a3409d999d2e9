"""Noise with an offset of its mean, so that dark and bright images can be learnt.

Guttenberg 2023, "Diffusion with offset noise", https://www.crosslabs.org/blog/diffusion-with-offset-noise
"""

from __future__ import annotations

from torch import Tensor


def add_offset(noise_BCHW: Tensor, normal_BC11: Tensor, strength: Tensor) -> Tensor:
    """noise + strength · one normal number per channel. `strength` fits [B, C, 1, 1]."""
    return noise_BCHW + strength * normal_BC11


def adaptive_strength(strength: Tensor, latents_BCHW: Tensor, *, scale: float) -> Tensor:
    """strength + scale · |mean of the latents' channel|, [B, C, 1, 1], not below 0 (kohya's adaptive_noise_scale)."""
    return (strength + scale * latents_BCHW.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)
