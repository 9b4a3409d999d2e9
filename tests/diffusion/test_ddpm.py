"""The forward process against diffusers' scheduler and against its own closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from library.diffusion import ddpm

T = torch.tensor([0, 1, 500, 999])


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, 8, 8, generator=generator), torch.randn(4, 4, 8, 8, generator=generator)


def test_add_noise_is_diffusers(scheduler, pair):
    latents, noise = pair
    ours = ddpm.add_noise(latents, noise, T, scheduler.alphas_cumprod.double())
    torch.testing.assert_close(ours, scheduler.add_noise(latents, noise, T), rtol=1e-5, atol=1e-6)


def test_velocity_is_diffusers(scheduler, pair):
    latents, noise = pair
    ours = ddpm.prediction_target("v_prediction", latents, noise, T, scheduler.alphas_cumprod.double())
    torch.testing.assert_close(ours, scheduler.get_velocity(latents, noise, T), rtol=1e-5, atol=1e-6)


def test_noise_and_velocity_give_back_the_image(scheduler, pair):
    """x_0 = sqrt(a) x_t - sqrt(1 - a) v, exactly (arXiv 2202.00512)."""
    latents, noise = (x.double() for x in pair)
    table = scheduler.alphas_cumprod.double()
    noisy = ddpm.add_noise(latents, noise, T, table)
    v = ddpm.velocity(latents, noise, T, table)
    a = table[T].view(-1, 1, 1, 1)
    torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, latents, rtol=0, atol=1e-12)


def test_epsilon_target_is_the_noise(scheduler, pair):
    latents, noise = pair
    assert ddpm.prediction_target("epsilon", latents, noise, T, scheduler.alphas_cumprod) is noise


def test_signal_to_noise_falls_and_is_zero_without_signal(scheduler):
    snr = ddpm.signal_to_noise(scheduler.alphas_cumprod.double())
    assert (snr.diff() < 0).all()
    assert ddpm.signal_to_noise(torch.tensor([0.0])).item() == 0.0


def test_timesteps_cover_the_range_and_follow_the_generator():
    generator = torch.Generator().manual_seed(3)
    draws = [ddpm.uniform_timestep(generator) for _ in range(20_000)]
    assert min(draws) == 0 or min(draws) < 3
    assert 996 < max(draws) <= 999
    # the mean of 20,000 uniform draws has a standard error of 2.04
    assert abs(sum(draws) / len(draws) - 499.5) < 10
    assert ddpm.uniform_timestep(torch.Generator().manual_seed(5)) == ddpm.uniform_timestep(
        torch.Generator().manual_seed(5)
    )
