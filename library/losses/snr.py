"""Weights of a sample by the signal-to-noise ratio of its timestep."""

from __future__ import annotations

from torch import Tensor


def min_snr_weight(snr_B: Tensor, *, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556), per sample.

    The paper weights the loss on x_0 by min(SNR, gamma). The same loss written on eps divides that by SNR, written on v
    by SNR + 1 (their §3.4). At SNR = 0 (zero terminal SNR) the eps form has the limit 1, which is used there.
    """
    clipped = snr_B.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return clipped / (snr_B + 1)
    return (clipped / snr_B).nan_to_num(nan=1.0)
