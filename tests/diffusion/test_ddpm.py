"""The forward process against diffusers' scheduler and against its own closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from library.diffusion.ddpm import DDPM

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
    ours = DDPM("epsilon", scheduler.alphas_cumprod.double()).noisy(latents, noise, T)
    torch.testing.assert_close(ours, scheduler.add_noise(latents, noise, T), rtol=1e-5, atol=1e-6)


def test_velocity_is_diffusers(scheduler, pair):
    latents, noise = pair
    ours = DDPM("v_prediction", scheduler.alphas_cumprod.double()).target(latents, noise, T)
    torch.testing.assert_close(ours, scheduler.get_velocity(latents, noise, T), rtol=1e-5, atol=1e-6)


def test_noise_and_velocity_give_back_the_image(scheduler, pair):
    """x_0 = sqrt(a) x_t - sqrt(1 - a) v, exactly (arXiv 2202.00512)."""
    latents, noise = (x.double() for x in pair)
    table = scheduler.alphas_cumprod.double()
    process = DDPM("v_prediction", table)
    noisy, v = process.noisy(latents, noise, T), process.target(latents, noise, T)
    a = table[T].view(-1, 1, 1, 1)
    torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, latents, rtol=0, atol=1e-12)


def test_epsilon_target_is_the_noise(scheduler, pair):
    latents, noise = pair
    assert DDPM("epsilon", scheduler.alphas_cumprod).target(latents, noise, T) is noise


def test_signal_to_noise_falls_and_is_zero_without_signal(scheduler):
    snr = DDPM("epsilon", scheduler.alphas_cumprod.double()).signal_to_noise(torch.arange(1000))
    assert (snr.diff() < 0).all()
    assert DDPM("epsilon", torch.tensor([0.0])).signal_to_noise(torch.tensor([0])).item() == 0.0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_last_timestep_without_signal_is_finite(prediction_type, pair):
    """Zero terminal SNR: x_t is the noise, v is -x_0 (arXiv 2305.08891)."""
    latents, noise = pair
    t, table = torch.full((4,), 2), torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    process = DDPM(prediction_type, table)
    torch.testing.assert_close(process.noisy(latents, noise, t), noise, rtol=0, atol=0)
    expected = noise if prediction_type == "epsilon" else -latents
    torch.testing.assert_close(process.target(latents, noise, t), expected, rtol=0, atol=0)


def test_steps_bins_and_shares():
    process = DDPM("epsilon", torch.linspace(0.99, 0.01, 1000, dtype=torch.float64))
    assert process.steps == 1000
    assert process.bins(5) == ["000-199", "200-399", "400-599", "600-799", "800-999"]
    t = torch.tensor([0, 199, 200, 999])
    assert process.bin_of(t, 5).tolist() == [0, 0, 1, 4]
    assert process.share(t).tolist() == [0, 0.199, 0.2, 0.999]
    assert torch.equal(process.at(t), t)
    assert process.stacked([3, 4]).dtype == torch.int64


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_a_step_without_noise_is_ddims(scheduler, pair, predicts):
    """Up to the table's single precision there. Of clean latents' own noise it leads to their latents at that level."""
    noisy, prediction = pair
    settings = {"prediction_type": predicts, "timestep_spacing": "trailing", "set_alpha_to_one": False}
    theirs = DDIMScheduler.from_config(scheduler.config, **settings)
    theirs.set_timesteps(40)
    process = DDPM(predicts, scheduler.alphas_cumprod.double())
    level, following = torch.full((4,), 999), torch.full((4,), 974)
    ours = process.denoised(noisy, prediction, level, following)
    torch.testing.assert_close(ours, theirs.step(prediction, 999, noisy).prev_sample, rtol=1e-4, atol=1e-4)
    latents, noise = (x.double() for x in pair)
    there = process.denoised(process.noisy(latents, noise, T[3:]), process.target(latents, noise, T[3:]), T[3:], T[2:3])
    torch.testing.assert_close(there, process.noisy(latents, noise, T[2:3]), rtol=0, atol=1e-9)
