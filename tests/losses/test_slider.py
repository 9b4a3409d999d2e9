"""The target of a slider: its closed form."""

from __future__ import annotations

import pytest
import torch

from library.diffusion.ddpm import DDPM
from library.diffusion.noise_schedule import alphas_cumprod
from library.losses.slider import slider_target


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("action", "sign"), [("erase", -1), ("enhance", 1)])
def test_the_neutral_moves_by_the_difference(action: str, sign: int) -> None:
    neutral, positive, unconditional = map(drawn, range(3))
    found = slider_target(neutral, positive, unconditional, action=action, guidance_scale=1.5)
    torch.testing.assert_close(found, neutral + sign * 1.5 * (positive - unconditional), rtol=0, atol=1e-12)


def test_velocities_move_as_their_noises_do() -> None:
    """The target of a model of v is the velocity of the noise that a model of noise would get, at the same latents."""
    process = DDPM("v_prediction", alphas_cumprod({}, where=""))
    noisy, level = drawn(9), torch.tensor([500, 900])
    a = process.alphas_cumprod[level].view(-1, 1, 1, 1)
    velocities = list(map(drawn, range(3)))
    noises = [a.sqrt() * v + (1 - a).sqrt() * noisy for v in velocities]
    settings = {"action": "erase", "guidance_scale": 2.0}
    target = slider_target(*velocities, **settings)
    expected = slider_target(*noises, **settings)
    torch.testing.assert_close(a.sqrt() * target + (1 - a).sqrt() * noisy, expected, rtol=0, atol=1e-12)
