"""Offset, multi-resolution and perturbed noise against their formulas."""

from __future__ import annotations

import pytest
import torch

from library.diffusion.input_perturbation import perturb
from library.diffusion.multires_noise import add_resolutions
from library.diffusion.noise_offset import adaptive_strength, add_offset


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_an_offset_moves_each_channel_as_a_whole():
    noise, offset = normal(2, 4, 8, 8), normal(2, 4, 1, 1, seed=1)
    moved = add_offset(noise, offset, torch.tensor(0.1))
    torch.testing.assert_close(moved - noise, (0.1 * offset).expand_as(noise), rtol=0, atol=1e-6)
    per_sample = add_offset(noise, offset, torch.tensor([0.0, 0.2]).view(2, 1, 1, 1))
    torch.testing.assert_close(per_sample[0], noise[0])
    torch.testing.assert_close(per_sample[1], noise[1] + 0.2 * offset[1])


def test_an_adaptive_offset_follows_the_latents_mean():
    """Kohya's apply_noise_offset: strength + scale · |mean over h and w|, not below 0."""
    latents = torch.zeros(1, 2, 2, 2)
    latents[0, 0] = torch.tensor([[-4.0, 0.0], [0.0, 0.0]])
    assert adaptive_strength(torch.tensor(0.1), latents, scale=0.5).flatten().tolist() == pytest.approx([0.6, 0.1])
    assert adaptive_strength(torch.tensor(0.1), latents, scale=-0.5).flatten().tolist()[0] == 0.0


def test_a_perturbed_input_has_more_noise():
    """sqrt(1 + gamma²) of it (arXiv 2301.11706)."""
    noise, extra = normal(1, 4, 64, 64), normal(1, 4, 64, 64, seed=1)
    perturbed = perturb(noise, extra, torch.tensor(0.5))
    torch.testing.assert_close(perturbed, noise + 0.5 * extra)
    assert abs(perturbed.std().item() - 1.25**0.5) < 0.02


def test_resolutions_are_added_as_in_the_published_code():
    """noise += upsample(randn(w / r^i, h / r^i)) · discount^i with r in 2 … 4, then divided by its deviation."""
    noise, (height, width) = normal(4, 24, 16), (24, 16)
    found = add_resolutions(noise, iterations=3, discount=0.4, generator=torch.Generator().manual_seed(5))

    generator, expected = torch.Generator().manual_seed(5), noise.clone()
    upsample = torch.nn.Upsample(size=(height, width), mode="bilinear")
    for i in range(3):
        r = torch.rand((), generator=generator, dtype=torch.float64).item() * 2 + 2
        sides = max(1, int(height / r**i)), max(1, int(width / r**i))
        expected += upsample(torch.randn(1, 4, *sides, generator=generator))[0] * 0.4**i
        if 1 in sides:
            break
    torch.testing.assert_close(found, expected / expected.std(), rtol=1e-6, atol=1e-6)


def test_many_resolutions_keep_the_deviation_and_join_neighbours():
    noise = normal(4, 64, 64)
    found = add_resolutions(noise, iterations=10, discount=0.9, generator=torch.Generator().manual_seed(5))
    assert abs(found.std().item() - 1) < 1e-5

    def neighbours(x: torch.Tensor) -> float:
        return (x[:, :, 1:] * x[:, :, :-1]).mean().item()

    assert abs(neighbours(noise)) < 0.05
    assert neighbours(found) > 0.3


def test_the_coarsest_grid_ends_the_series():
    """A latent of one cell has only one grid: more iterations draw nothing more."""
    generator = torch.Generator().manual_seed(5)
    add_resolutions(normal(4, 1, 3), iterations=9, discount=0.5, generator=generator)
    after = torch.rand((), generator=generator)
    other = torch.Generator().manual_seed(5)
    add_resolutions(normal(4, 1, 3), iterations=1, discount=0.5, generator=other)
    assert torch.equal(after, torch.rand((), generator=other))
