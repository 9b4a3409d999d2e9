"""Weights of timesteps against closed forms, on epsilon and v, and against each other."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from library.diffusion.ddpm import DDPM
from library.losses.snr import debiased_weight, like_noise_weight, min_snr_weight, v_like_weight


def ratio(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("snr", "epsilon", "velocity"),
    [
        # min(SNR, 5) / SNR and min(SNR, 5) / (SNR + 1), arXiv 2303.09556
        (0.25, 1.0, 0.2),
        (5.0, 1.0, 5 / 6),
        (20.0, 0.25, 5 / 21),
        (0.0, 1.0, 0.0),
    ],
)
def test_min_snr(snr, epsilon, velocity):
    assert min_snr_weight(ratio(snr), gamma=5.0, prediction_type="epsilon").item() == pytest.approx(epsilon, abs=1e-15)
    velocities = min_snr_weight(ratio(snr), gamma=5.0, prediction_type="v_prediction")
    assert velocities.item() == pytest.approx(velocity, abs=1e-15)


@pytest.mark.parametrize(
    ("snr", "epsilon", "velocity"),
    [(4.0, 0.5, 1 / 5), (0.01, 10.0, 1 / 1.01), (4000.0, 1000**-0.5, 1 / 1001), (0.0, math.inf, 1.0)],
)
def test_debiased_estimation(snr, epsilon, velocity):
    """1 / sqrt(SNR) (arXiv 2310.08442); on v kohya's 1 / (SNR + 1); both with SNR cut at 1000."""
    assert debiased_weight(ratio(snr), prediction_type="epsilon").item() == pytest.approx(epsilon)
    assert debiased_weight(ratio(snr), prediction_type="v_prediction").item() == pytest.approx(velocity)


def test_weights_between_noise_and_velocity():
    assert like_noise_weight(ratio(3.0, 0.0, 5000.0)).tolist() == pytest.approx([0.75, 0.0, 1000 / 1001])
    # loss + loss / (SNR / (SNR + 1)) · 0.5
    assert v_like_weight(ratio(3.0, 1.0), strength=0.5).tolist() == pytest.approx([1 + 0.5 / 0.75, 2.0])
    assert v_like_weight(ratio(0.0), strength=0.5).isinf()


@pytest.mark.parametrize("a", [0.9, 0.5, 0.01])
def test_the_loss_on_v_becomes_the_loss_on_the_noise_that_it_means(a):
    """One wrong answer, written both ways: eps = sqrt(1 - a) x_t + sqrt(a) v (arXiv 2202.00512)."""
    x_t, right, answer = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise = [(1 - a) ** 0.5 * x_t + a**0.5 * v for v in (right, answer)]
    on_v = (answer - right).square().sum()
    on_noise = (noise[1] - noise[0]).square().sum()
    snr = ratio(a / (1 - a))
    torch.testing.assert_close(on_v * like_noise_weight(snr)[0], on_noise)
    # and back: what --v_pred_like_loss adds to the loss on noise is the loss on v
    torch.testing.assert_close(on_noise * (v_like_weight(snr, strength=1.0)[0] - 1), on_v)
    # min-SNR means the same on both
    by_type = [min_snr_weight(snr, gamma=5.0, prediction_type=name)[0] for name in ("epsilon", "v_prediction")]
    torch.testing.assert_close(on_noise * by_type[0], on_v * by_type[1])


def test_the_ratio_is_diffusers():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.arange(1000)
    ours = DDPM("epsilon", scheduler.alphas_cumprod.double()).signal_to_noise(t).float()
    torch.testing.assert_close(ours, compute_snr(scheduler, t), rtol=2e-4, atol=0)


def test_min_snr_is_diffusers():
    """examples/text_to_image/train_text_to_image_lora.py: min(SNR, gamma) / SNR, and / (SNR + 1) for v."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    snr = compute_snr(scheduler, torch.arange(1000))
    clipped = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    ours = DDPM("epsilon", scheduler.alphas_cumprod.double()).signal_to_noise(torch.arange(1000))
    for name, divisor in (("epsilon", snr), ("v_prediction", snr + 1)):
        weights = min_snr_weight(ours, gamma=5.0, prediction_type=name).float()
        torch.testing.assert_close(weights, clipped / divisor, rtol=2e-4, atol=0)
