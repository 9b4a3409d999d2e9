"""The noise schedule against diffusers' DDPMScheduler."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from library.diffusion.noise_schedule import alphas_cumprod, zero_terminal
from library.errors import UserError

_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    "config",
    [
        _SD,
        _SD | {"num_train_timesteps": 500},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.001 * i for i in range(1, 101)], "num_train_timesteps": 100},
        _SD | {"rescale_betas_zero_snr": True},
    ],
)
def test_the_table_is_diffusers_own(config: dict[str, Any]) -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    expected = DDPMScheduler(**config).alphas_cumprod
    found = alphas_cumprod(config, where="x")
    assert found.dtype == torch.float64
    assert torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-7)
    assert (found.diff() < 0).all()


def test_zero_terminal_snr_is_diffusers_published_function() -> None:
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    betas = torch.linspace(_SD["beta_start"] ** 0.5, _SD["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas.clone()), dim=0)
    table = zero_terminal(torch.cumprod(1 - betas, dim=0))
    torch.testing.assert_close(table, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(zero_terminal(table), table, rtol=1e-12, atol=0)  # done twice is done once


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    table = alphas_cumprod(_SD | {"rescale_betas_zero_snr": True}, where="x")
    assert table[-1] == 0
    assert torch.isclose(table[0], alphas_cumprod(_SD, where="x")[0])


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(UserError, match=r"scheduler x: beta_schedule 'scaled_liner' .* did you mean 'scaled_linear'"):
        alphas_cumprod({"beta_schedule": "scaled_liner"}, where="scheduler x")


@pytest.mark.parametrize("value", ["0.1", None, [0.1], True, 0, -1, float("nan"), float("inf")], ids=repr)
@pytest.mark.parametrize("name", ["beta_start", "beta_end", "num_train_timesteps"])
def test_a_value_that_is_no_number_is_named(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"scheduler x: {name} is .*, which is not a number above 0"):
        alphas_cumprod({**_SD, name: value}, where="scheduler x")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"trained_betas": "abc"}, "trained_betas is abc, which is no list of 2 to 100000 numbers"),
        ({"trained_betas": []}, "trained_betas is [], which is no list"),
        ({"trained_betas": {"a": 1}}, "trained_betas is {'a': 1}, which is no list"),
        ({"trained_betas": [0.1, "x"]}, "trained_betas holds 'x', which is no number"),
        ({"trained_betas": [[0.1], [0.2]]}, "trained_betas holds '[0.1]', which is no number"),
        ({"trained_betas": [0.5, 2.0]}, "its betas are 0.5 to 2, and must lie between 0 and 1"),
        ({"trained_betas": [0.5, float("nan")]}, "must lie between 0 and 1"),
        ({"beta_start": 2, "beta_end": 3}, "its betas are 2 to 3, and must lie between 0 and 1"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps is 10.5, which is not a whole number up to 100000"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000, which is not a whole number"),
    ],
    ids=str,
)
def test_what_is_no_schedule_is_named(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^scheduler x: .*{re.escape(said)}"):
        alphas_cumprod(config, where="scheduler x")
