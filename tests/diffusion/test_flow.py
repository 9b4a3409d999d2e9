"""Flow matching against its closed forms and diffusers' scheduler, and one prediction for all that measure."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from library.config.samplers import SAMPLERS
from library.diffusion import levels
from library.diffusion.ddpm import DDPM
from library.diffusion.flow import Flow, ResolutionShift
from library.diffusion.process import Process, middles, predict_and_target

SIGMA = torch.tensor([0.0, 0.25, 0.5, 1.0])
SIZE = (32, 48)


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return latents, noise


def test_the_line_and_its_velocity() -> None:
    """x = (1 - σ) x_0 + σ eps; from any point of it, -σ v leads to the image and (1 - σ) v to the noise."""
    latents, noise = pair()
    flow = Flow()
    noisy, velocity = flow.noisy(latents, noise, SIGMA), flow.target(latents, noise, SIGMA)
    sigma = SIGMA.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, (1 - sigma) * latents + sigma * noise, rtol=0, atol=1e-15)
    torch.testing.assert_close(noisy - sigma * velocity, latents, rtol=0, atol=1e-14)
    torch.testing.assert_close(noisy + (1 - sigma) * velocity, noise, rtol=0, atol=1e-14)
    assert torch.equal(noisy[0], latents[0])
    assert torch.equal(noisy[3], noise[3])


def test_noisy_latents_are_diffusers() -> None:
    latents, noise = pair(torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler()
    chosen = scheduler.timesteps[[10, 500, 700, 999]]
    ours = Flow().noisy(latents, noise, (chosen / 1000).float())
    torch.testing.assert_close(ours, scheduler.scale_noise(latents, chosen, noise), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_keep_their_dtype(dtype: torch.dtype) -> None:
    latents, noise = pair(dtype)
    for process, level in ((Flow(), SIGMA), (DDPM("epsilon", SIGMA.flip(0).double()), torch.arange(4))):
        assert process.noisy(latents, noise, level).dtype == dtype


def test_ratios_shares_and_bins() -> None:
    flow = Flow()
    assert flow.signal_to_noise(SIGMA).tolist() == [math.inf, 9.0, 1.0, 0.0]
    assert flow.share(SIGMA).tolist() == SIGMA.tolist()
    assert flow.bin_of(torch.tensor([0.0, 0.1999, 0.2001, 1.0]), 5).tolist() == [0, 0, 1, 4]
    assert flow.bins(5) == DDPM("epsilon", torch.linspace(0.9, 0.1, 1000)).bins(5)
    torch.testing.assert_close(flow.at(torch.tensor([100, 999])), torch.tensor([0.1, 0.999]), rtol=0, atol=0)


def test_levels_are_drawn_in_their_range() -> None:
    generator = torch.Generator().manual_seed(2)
    found = Flow().stacked([Flow().draw(generator, density=None, low=200, high=600, size=SIZE) for _ in range(4000)])
    assert found.dtype == torch.float32
    assert 0.2 <= found.min() < 0.201
    assert 0.599 < found.max() <= 0.6
    assert found.mean().item() == pytest.approx(0.4, abs=0.006)  # the standard error is 0.0018
    last = Flow().draw(generator, density=lambda generator: 1.0, low=0, high=1000, size=SIZE)
    assert Flow().stacked([last]).item() < 1


@pytest.mark.parametrize("shift", [3.0, ResolutionShift()])
def test_a_shift_moves_what_is_drawn(shift: float | ResolutionShift) -> None:
    """The median u = 1/2 becomes shift / (shift + 1)."""
    flow, generator = Flow(shift), torch.Generator().manual_seed(2)
    found = torch.tensor(
        [flow.draw(generator, density=levels.uniform, low=0, high=1000, size=SIZE) for _ in range(4000)]
    )
    factor = flow.shift_at(SIZE)
    assert factor > 1.5
    # the density at the median is (1 + s)² / (4 s) ≤ 1.4, the standard error of the median below 0.011
    assert found.median().item() == pytest.approx(factor / (factor + 1), abs=0.03)


def test_the_shift_of_a_resolution_is_flux() -> None:
    """exp(mu), mu from 0.5 at 256 tokens (256 pixels a side) to 1.15 at 4096 (1024 pixels), linear between."""
    shift = ResolutionShift()
    assert shift.of((32, 32)) == pytest.approx(math.exp(0.5))
    assert shift.of((128, 128)) == pytest.approx(math.exp(1.15))
    assert shift.of((128, 32)) == pytest.approx(math.exp(0.5 + 0.65 * (1024 - 256) / (4096 - 256)))


def test_the_sampler_shifts_as_training_does() -> None:
    scheduler = Flow(3.0).scheduler("euler")
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.1])
    expected = [levels.shifted(u, shift=3.0) for u in (0.9, 0.5, 0.1)]
    assert scheduler.sigmas.tolist() == pytest.approx([*expected, 0.0])
    dynamic = Flow(ResolutionShift()).scheduler("euler")
    dynamic.set_timesteps(sigmas=[0.9, 0.5, 0.1], mu=math.log(3.0))
    assert dynamic.sigmas.tolist() == pytest.approx([*expected, 0.0])


def test_every_sampler_can_be_made() -> None:
    for process in (Flow(), Flow(ResolutionShift()), DDPM("epsilon", torch.tensor([0.9]))):
        assert set(process.samplers) <= set(SAMPLERS), "names that --sample_sampler takes"
        for name in set(process.samplers) - {"lms"}:  # which needs scipy
            assert process.scheduler(name).config.num_train_timesteps == 1000


@pytest.mark.parametrize("process", [Flow(), DDPM("v_prediction", torch.linspace(0.99, 0.01, 1000).double())])
def test_one_prediction_and_its_target(process: Process) -> None:
    """The network sees the noise that is added, the target has the noise that is to be found."""
    latents, noise = pair()
    level, added = process.at(torch.tensor([0, 300, 600, 999])), 2 * noise
    seen = predict_and_target(
        process, lambda x, at, condition: x * at.view(-1, 1, 1, 1) + condition["h"], latents, noise, level,
        {"h": torch.ones(1)}, added_BCHW=added,
    )  # fmt: skip
    assert torch.equal(seen.noisy_BCHW, process.noisy(latents, added, level))
    assert torch.equal(seen.target_BCHW, process.target(latents, noise, level))
    assert torch.equal(seen.prediction_BCHW, seen.noisy_BCHW * level.view(-1, 1, 1, 1) + 1)
    plain = predict_and_target(process, lambda x, at, condition: x, latents, noise, level, {})
    assert torch.equal(plain.noisy_BCHW, process.noisy(latents, noise, level))


def test_the_middles_are_of_five_equal_parts() -> None:
    assert middles(0, 1000) == (100, 300, 500, 700, 900)
    assert middles(200, 300) == (210, 230, 250, 270, 290)
    assert middles(7, 8) == (7,)


def test_a_step_without_noise_stays_on_the_line() -> None:
    latents, noise = pair()
    flow, level, following = Flow(), torch.full((4,), 0.9), torch.full((4,), 0.4)
    there = flow.denoised(flow.noisy(latents, noise, level), flow.target(latents, noise, level), level, following)
    torch.testing.assert_close(there, flow.noisy(latents, noise, following), rtol=0, atol=1e-12)
