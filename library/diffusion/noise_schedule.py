"""The noise schedule that a base model was trained with, from its scheduler's configuration."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError, did_you_mean
from library.files.json_text import Config

_MOST_STEPS = 100_000  # the longest accepted table; models have 1000


def alphas_cumprod(config: Config, *, where: str) -> Tensor:
    """The products of all alphas up to each timestep, [num_train_timesteps] in float64, from 1 towards 0.

    The same schedule as in diffusers' DDPMScheduler, whose table is in single precision. `where` names the
    configuration in errors. Raises UserError for values that are no schedule.
    """
    steps = _number(config, "num_train_timesteps", 1000, where=where)
    if steps != int(steps) or steps > _MOST_STEPS:
        raise UserError(f"{where}: num_train_timesteps is {steps!r}, which is not a whole number up to {_MOST_STEPS}")
    name = config.get("beta_schedule", "linear")
    start = _number(config, "beta_start", 0.0001, where=where)
    end = _number(config, "beta_end", 0.02, where=where)
    if (trained := config.get("trained_betas")) is not None:
        betas = _trained(trained, where=where)
    elif name == "linear":
        betas = torch.linspace(start, end, int(steps), dtype=torch.float64)
    elif name == "scaled_linear":  # Rombach et al. 2022, latent diffusion
        betas = torch.linspace(start**0.5, end**0.5, int(steps), dtype=torch.float64) ** 2
    elif name == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, arXiv 2102.09672
        levels = (torch.arange(int(steps) + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        betas = (1 - levels[1:].cos() ** 2 / levels[:-1].cos() ** 2).clamp(max=0.999)
    else:
        known = ("linear", "scaled_linear", "squaredcos_cap_v2")
        raise UserError(f"{where}: beta_schedule '{name}' is not supported{did_you_mean(str(name), known)}")
    if not ((betas > 0) & (betas < 1)).all():
        raise UserError(f"{where}: its betas are {betas.min():g} to {betas.max():g}, and must lie between 0 and 1")
    products = torch.cumprod(1 - betas, dim=0)
    return zero_terminal(products) if config.get("rescale_betas_zero_snr") else products


def _trained(betas: Any, *, where: str) -> Tensor:
    """`trained_betas`, one for each timestep."""
    if not isinstance(betas, list | tuple) or not 1 < len(betas) <= _MOST_STEPS:
        raise UserError(f"{where}: trained_betas is {str(betas)[:50]}, which is no list of 2 to {_MOST_STEPS} numbers")
    for beta in betas:
        if isinstance(beta, bool) or not isinstance(beta, int | float):
            raise UserError(f"{where}: trained_betas holds {str(beta)[:50]!r}, which is no number")
    return torch.tensor(betas, dtype=torch.float64)


def _number(config: Config, name: str, default: float, *, where: str) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {name} is {value!r}, which is not a number above 0")
    return value


def zero_terminal(products: Tensor) -> Tensor:
    """Shift and scale so that the last timestep is pure noise: Lin et al. 2023, arXiv 2305.08891, algorithm 1."""
    roots = products.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
