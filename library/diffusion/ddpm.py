"""The forward diffusion process of DDPM and what the network is asked to predict.

Notation of Ho et al. 2020 (arXiv 2006.11239): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, with a_t the cumulative product
of the alphas. Velocity after Salimans & Ho 2022 (arXiv 2202.00512): v = sqrt(a_t) eps - sqrt(1 - a_t) x_0.
"""

from __future__ import annotations

from torch import Tensor

from library.gpu import to_device

PREDICTION_TYPES = ("epsilon", "v_prediction")


def signal_and_noise_rates(alphas_cumprod: Tensor, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), each [B, 1, 1, 1] on the device and in the dtype of `like`.

    The square roots are taken in the table's own precision: 1 - a_t loses its digits in low precision near t = 0.
    """
    a = alphas_cumprod[t_B.to(alphas_cumprod.device)].view(-1, 1, 1, 1)
    return to_device(a.sqrt().to(like.dtype), like.device), to_device((1 - a).sqrt().to(like.dtype), like.device)


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t for x_0 = `latents_BCHW`; t in 0 ... len(alphas_cumprod) - 1."""
    signal, sigma = signal_and_noise_rates(alphas_cumprod, t_B, latents_BCHW)
    return signal * latents_BCHW + sigma * noise_BCHW


def velocity(latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """v = sqrt(a_t) eps - sqrt(1 - a_t) x_0."""
    signal, sigma = signal_and_noise_rates(alphas_cumprod, t_B, latents_BCHW)
    return signal * noise_BCHW - sigma * latents_BCHW


def prediction_target(
    prediction_type: str, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """What a network of this prediction type should answer for x_t."""
    assert prediction_type in PREDICTION_TYPES, prediction_type
    if prediction_type == "epsilon":
        return noise_BCHW
    return velocity(latents_BCHW, noise_BCHW, t_B, alphas_cumprod)


def signal_to_noise(alphas_cumprod: Tensor) -> Tensor:
    """SNR(t) = a_t / (1 - a_t), one value per timestep. It is 0 where a_t is 0 (zero terminal SNR)."""
    return alphas_cumprod / (1 - alphas_cumprod)
