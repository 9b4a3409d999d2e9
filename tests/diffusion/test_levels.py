"""Distributions of noise levels: range, known quantiles, and diffusers' and kohya's formulas."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from library.diffusion import levels
from library.diffusion.ddpm import DDPM

COUNT = 4000
PROCESS = DDPM("epsilon", torch.linspace(0.99, 0.01, 1000, dtype=torch.float64))


def uniform_timestep(generator: torch.Generator, *, low: int = 0, high: int = 1000) -> int:
    return PROCESS.draw(generator, density=None, low=low, high=high, size=(8, 8))


def draws(density: levels.Density, *, shift: float = 1.0, low: int = 0, high: int = 1000) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    density = partial(levels.shifted_density, density, shift=shift)
    return [PROCESS.draw(generator, density=density, low=low, high=high, size=(8, 8)) for _ in range(COUNT)]


def share_below(found: list[int], bound: float) -> float:
    return sum(t < bound for t in found) / len(found)


def test_uniform_covers_the_range_and_follows_the_generator():
    generator = torch.Generator().manual_seed(3)
    found = [uniform_timestep(generator) for _ in range(20_000)]
    assert min(found) < 3
    assert 996 < max(found) <= 999
    # the mean of 20,000 uniform draws has a standard error of 2.04
    assert abs(sum(found) / len(found) - 499.5) < 10
    again = torch.Generator().manual_seed(3)
    assert [uniform_timestep(again) for _ in range(5)] == found[:5]
    part = [uniform_timestep(generator, low=300, high=303) for _ in range(100)]
    assert set(part) == {300, 301, 302}


# The share of t below 250 and below 500. The standard error of a share of 4,000 draws is at most 0.008.
def normal_cdf(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


@pytest.mark.parametrize(
    ("density", "shift", "below_250", "below_500"),
    [
        (levels.uniform, 1.0, 0.25, 0.5),
        # u < 1/4 after the shift of 3 is u < 1/10 before it, u < 1/2 is u < 1/4
        (levels.uniform, 3.0, 0.1, 0.25),
        # logit(1/4) = -ln 3
        (partial(levels.logit_normal, mean=0.0, std=1.0), 1.0, normal_cdf(-math.log(3)), 0.5),
        (partial(levels.logit_normal, mean=1.0, std=2.0), 1.0, normal_cdf((-math.log(3) - 1) / 2), normal_cdf(-0.5)),
        # scale 0 is uniform; cos² makes it symmetric, so half lies below the middle whatever the scale
        (partial(levels.mode, scale=0.0), 1.0, 0.25, 0.5),
        (partial(levels.mode, scale=1.29), 1.0, None, 0.5),
    ],
)
def test_shares(density, shift, below_250, below_500):
    found = draws(density, shift=shift)
    assert 0 <= min(found) <= max(found) <= 999
    assert share_below(found, 500) == pytest.approx(below_500, abs=0.03)
    if below_250 is not None:
        assert share_below(found, 250) == pytest.approx(below_250, abs=0.03)


def test_mode_prefers_the_middle():
    found = draws(partial(levels.mode, scale=1.29))
    assert share_below(found, 750) - share_below(found, 250) > 0.6


def test_a_part_of_the_range_is_filled_by_the_whole_distribution():
    found = draws(partial(levels.logit_normal, mean=0.0, std=1.0), low=100, high=110)
    assert set(found) == set(range(100, 110))
    assert share_below(found, 105) == pytest.approx(0.5, abs=0.03)


def test_the_last_timestep_is_never_passed():
    def end(generator: torch.Generator) -> float:
        return 1.0

    assert PROCESS.draw(torch.Generator(), density=end, low=0, high=1000, size=(8, 8)) == 999


@pytest.mark.parametrize(
    ("name", "density"),
    [
        ("logit_normal", partial(levels.logit_normal, mean=0.5, std=1.5)),
        ("mode", partial(levels.mode, scale=1.29)),
    ],
)
def test_densities_are_diffusers(name, density):
    """Quantiles of many draws of each: training_utils.compute_density_for_timestep_sampling."""
    generator = torch.Generator().manual_seed(7)
    theirs = compute_density_for_timestep_sampling(
        name, 50_000, logit_mean=0.5, logit_std=1.5, mode_scale=1.29, generator=generator
    )
    ours = torch.tensor([density(generator) for _ in range(COUNT)])
    at = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(ours.quantile(at), theirs.quantile(at), rtol=0, atol=0.03)


def test_shift_is_kohyas():
    """u · shift / (1 + (shift - 1) · u), sd3_train_utils.py."""
    assert levels.shifted(0.5, shift=3.0) == pytest.approx(0.75)
    assert levels.shifted(0.75, shift=1 / 3) == pytest.approx(0.5)
    assert [levels.shifted(u, shift=5.0) for u in (0.0, 1.0)] == [0.0, 1.0]
