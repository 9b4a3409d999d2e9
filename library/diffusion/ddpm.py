"""The diffusion process of DDPM: a table of noise levels, one for each whole timestep.

Notation of Ho et al. 2020 (arXiv 2006.11239): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, with a_t the cumulative product
of the alphas. Velocity after Salimans & Ho 2022 (arXiv 2202.00512): v = sqrt(a_t) eps - sqrt(1 - a_t) x_0.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from library.config.samplers import SAMPLERS
from library.diffusion.levels import Density
from library.diffusion.process import SAMPLINGS, Scheduler, per_sample, range_names
from library.files.json_text import Config

PREDICTION_TYPES = ("epsilon", "v_prediction")

# Settings of diffusers' classes beside the model's own noise schedule
_SETTINGS: dict[str, dict[str, Any]] = {
    "pndm": {"skip_prk_steps": True},  # as Stable Diffusion's own configuration has it
    "dpmsolver": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},  # "zero" divides by it
    "dpmsolver++": {"algorithm_type": "dpmsolver++"},
    "dpmsingle": {"lower_order_final": True},  # else only some numbers of steps work
}


@dataclass(frozen=True)
class DDPM:
    """A `library.diffusion.process.Process` whose levels are the whole numbers t in 0 … len(alphas_cumprod) - 1.

    prediction_type: "epsilon" or "v_prediction". alphas_cumprod: a_t, [T] in float64 (see `noise_schedule`).
    settings: the same schedule as the configuration of diffusers' schedulers, for sampling.
    """

    prediction_type: str
    alphas_cumprod: Tensor
    settings: Config = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.prediction_type in PREDICTION_TYPES, self.prediction_type

    @property
    def steps(self) -> int:
        """The length of the table, usually 1000."""
        return len(self.alphas_cumprod)

    @property
    def samplers(self) -> Sequence[str]:
        """All of them."""
        return tuple(SAMPLERS)

    @property
    def samplings(self) -> Sequence[str]:
        """None of them shifts what is drawn."""
        return SAMPLINGS

    def at(self, step_B: Tensor) -> Tensor:
        """The steps themselves."""
        return step_B

    def draw(
        self,
        generator: torch.Generator,
        *,
        density: Density | None,
        low: int,
        high: int,
        size: tuple[int, int],
        sampling: str = SAMPLINGS[0],
    ) -> int:
        """One t in low ... high - 1; `density` draws the position within the range."""
        if density is None:
            return int(torch.randint(low, high, (), generator=generator))
        return min(low + int(density(generator) * (high - low)), high - 1)

    def stacked(self, levels: Sequence[float]) -> Tensor:
        """int64."""
        return torch.tensor(levels, dtype=torch.int64)

    def noisy(self, latents_BCHW: Tensor, noise_BCHW: Tensor, level_B: Tensor) -> Tensor:
        """x_t for x_0 = `latents_BCHW`."""
        signal, sigma = self._rates(level_B, latents_BCHW)
        return signal * latents_BCHW + sigma * noise_BCHW

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, level_B: Tensor) -> Tensor:
        """The noise, or the velocity."""
        if self.prediction_type == "epsilon":
            return noise_BCHW
        signal, sigma = self._rates(level_B, latents_BCHW)
        return signal * noise_BCHW - sigma * latents_BCHW

    def denoised(self, noisy_BCHW: Tensor, prediction_BCHW: Tensor, level_B: Tensor, next_B: Tensor) -> Tensor:
        """A step of DDIM with η = 0 (Song et al. 2020, arXiv 2010.02502, eq. 12)."""
        (signal, sigma), (next_signal, next_sigma) = self._rates(level_B, noisy_BCHW), self._rates(next_B, noisy_BCHW)
        if self.prediction_type == "epsilon":
            noise = prediction_BCHW
            latents = (noisy_BCHW - sigma * noise) / signal
        else:
            noise = signal * prediction_BCHW + sigma * noisy_BCHW
            latents = signal * noisy_BCHW - sigma * prediction_BCHW
        return next_signal * latents + next_sigma * noise

    def _rates(self, level_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), each [B, 1, 1, 1] on the device and in the dtype of `like`.

        The roots are taken in the table's own precision: in a low one, 1 - a_t is inexact near t = 0.
        """
        a = self._of_table(level_B)
        return per_sample(a.sqrt(), like), per_sample((1 - a).sqrt(), like)

    def _of_table(self, level_B: Tensor) -> Tensor:
        return self.alphas_cumprod[level_B.to(self.alphas_cumprod.device)]

    def signal_to_noise(self, level_B: Tensor) -> Tensor:
        """SNR(t) = a_t / (1 - a_t). It is 0 where a_t is 0 (zero terminal SNR)."""
        a = self._of_table(level_B)
        return a / (1 - a)

    def share(self, level_B: Tensor) -> Tensor:
        """t / T."""
        return level_B.to(self.alphas_cumprod.dtype) / self.steps

    def bins(self, count: int) -> list[str]:
        """In timesteps: "000-199" …"""
        return range_names(self.steps, count)

    def bin_of(self, level_B: Tensor, count: int) -> Tensor:
        return level_B * count // self.steps

    def scheduler(self, sampler: str) -> Scheduler:
        """With the process's own noise schedule and prediction type."""
        own = _new("ddim", {**self.settings, "prediction_type": self.prediction_type})
        return own if sampler == "ddim" else _new(sampler, own.config)


def _new(sampler: str, config: Config) -> Scheduler:
    """diffusers' scheduler for one of SAMPLERS, with the settings that its class has."""
    module, _, name = SAMPLERS[sampler].rpartition(".")
    scheduler = getattr(importlib.import_module(module), name)
    names = inspect.signature(scheduler).parameters
    own = {key: value for key, value in config.items() if key in names}
    return scheduler(**{**own, **_SETTINGS.get(sampler, {})})
