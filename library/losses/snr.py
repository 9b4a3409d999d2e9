"""Weights of noise levels by their signal-to-noise ratio, for the loss on what the network predicts.

The squared errors of one prediction in terms of eps and of v have the ratio |v|² = |eps|² (SNR + 1) / SNR; so a weight
for eps, times SNR / (SNR + 1), is the same weight for v.
"""

from __future__ import annotations

from torch import Tensor

# Kohya's scripts clamp the ratio here, except for min-SNR; Stable Diffusion exceeds it at t = 0 only (1175).
HIGHEST = 1000.0


def min_snr_weight(snr_B: Tensor, *, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556).

    The paper weights the loss on x_0 by min(SNR, gamma). The same loss written on eps divides that by SNR, written on v
    by SNR + 1 (their §3.4). At SNR = 0 (zero terminal SNR) the eps form has the limit 1, which is used there.
    """
    clipped = snr_B.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return clipped / (snr_B + 1)
    return (clipped / snr_B).nan_to_num(nan=1.0)


def debiased_weight(snr_B: Tensor, *, prediction_type: str) -> Tensor:
    """Debiased estimation (Yu et al. 2023, arXiv 2310.08442): 1 / sqrt(SNR) on eps; infinite at SNR = 0.

    On v it is kohya's 1 / (SNR + 1), which does not vanish at SNR = 0. (The paper's weight written on v would be
    sqrt(SNR) / (SNR + 1).)
    """
    snr_B = snr_B.clamp(max=HIGHEST)
    if prediction_type == "v_prediction":
        return 1 / (snr_B + 1)
    return snr_B.rsqrt()


def like_noise_weight(snr_B: Tensor) -> Tensor:
    """SNR / (SNR + 1): the loss on v becomes the loss on the equivalent noise. 0 at SNR = 0."""
    snr_B = snr_B.clamp(max=HIGHEST)
    return snr_B / (snr_B + 1)


def v_like_weight(snr_B: Tensor, *, strength: float) -> Tensor:
    """1 + strength · (SNR + 1) / SNR: adds to the loss on eps `strength` times the loss on the equivalent v.

    Infinite at SNR = 0, where v cannot be computed from eps.
    """
    return 1 + strength / like_noise_weight(snr_B)
