"""The process of flow matching along straight lines (rectified flow): x = (1 - σ) x_0 + σ eps, σ in 0 … 1.

Liu et al. 2022 (arXiv 2209.03003), Lipman et al. 2022 (arXiv 2210.02747). The network predicts the velocity
dx / dσ = eps - x_0, which is the same everywhere on the line. Levels are moved towards noise by a shift, after Esser
et al. 2024 (arXiv 2403.03206, §5.3.2): a constant of the model, or one that grows with the number of latent cells,
because averaging over more cells reduces the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.diffusion.levels import Density, shifted, uniform
from library.diffusion.process import SAMPLINGS, Scheduler, per_sample, range_names

_HIGHEST = 1.0 - 2.0**-24  # the largest float32 below 1

_SAMPLERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}


@dataclass(frozen=True)
class ResolutionShift:
    """A shift of exp(mu), with mu linear in the number of tokens, latent cells / patch² (FLUX.1, flux/sampling.py)."""

    patch: int = 2
    few_tokens: int = 256
    many_tokens: int = 4096
    mu_of_few: float = 0.5
    mu_of_many: float = 1.15

    def of(self, size: tuple[int, int]) -> float:
        """The shift for latents of `size` (height, width)."""
        tokens = (size[0] // self.patch) * (size[1] // self.patch)
        slope = (self.mu_of_many - self.mu_of_few) / (self.many_tokens - self.few_tokens)
        return math.exp(self.mu_of_few + slope * (tokens - self.few_tokens))


@dataclass(frozen=True)
class StepsShift:
    """A shift of exp(mu) of samples, with mu fitted to tokens and steps (FLUX.2, flux2/sampling.py): two lines in the
    number of tokens, for 10 and for 200 steps, and a line in the number of steps between them. Above 4300 tokens it is
    that for 200, whatever the steps. patch: latent cells of a token's side."""

    patch: int = 1
    steps: int = 50  # where a caller tells none

    def of(self, size: tuple[int, int], steps: int | None = None) -> float:
        """The shift for latents of `size` (height, width)."""
        tokens = (size[0] // self.patch) * (size[1] // self.patch)
        of_many = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return math.exp(of_many)
        slope = (of_many - (8.73809524e-05 * tokens + 1.89833333)) / (200 - 10)
        return math.exp(of_many + slope * ((self.steps if steps is None else steps) - 200))


Shift = float | ResolutionShift | StepsShift


@dataclass(frozen=True)
class Flow:
    """A `library.diffusion.process.Process` whose level is σ, float32 in 0 … 1.

    shift: of the levels, in training and sampling: 1 is none, above 1 more noise. `steps`: options and reports count σ
    in thousandths, the unit in which such networks get the time. drawn: the shifts of the levels drawn in training, by
    the way of --timestep_sampling, where they are not `shift`.
    """

    shift: Shift = 1.0
    steps: int = 1000
    drawn: Mapping[str, Shift] = field(default_factory=dict)

    @property
    def prediction_type(self) -> str:
        """The velocity of flow matching."""
        return "velocity"

    @property
    def samplers(self) -> Sequence[str]:
        """Solvers of flow matching's differential equation; DDPM's samplers solve another one."""
        return tuple(_SAMPLERS) if isinstance(self.shift, float | int) else ("euler",)

    @property
    def samplings(self) -> Sequence[str]:
        """Those of every process, and those that have a shift of their own."""
        return tuple(dict.fromkeys((*SAMPLINGS, *self.drawn)))

    def shift_at(self, size: tuple[int, int], sampling: str = "", *, steps: int | None = None) -> float:
        """The shift for latents of `size` (height, width): of samples of so many steps, or of levels that are drawn by
        `sampling`."""
        shift = self.drawn.get(sampling, self.shift)
        if isinstance(shift, StepsShift):
            return shift.of(size, steps)
        return shift.of(size) if isinstance(shift, ResolutionShift) else shift

    def at(self, step_B: Tensor) -> Tensor:
        """step / steps."""
        return (step_B.double() / self.steps).float()

    def draw(
        self,
        generator: torch.Generator,
        *,
        density: Density | None,
        low: int,
        high: int,
        size: tuple[int, int],
        sampling: str = SAMPLINGS[0],
    ) -> float:
        """σ in low / steps … high / steps, never 1: the position in the range is drawn by `density`, then shifted."""
        u = shifted((density or uniform)(generator), shift=self.shift_at(size, sampling))
        return min((low + u * (high - low)) / self.steps, _HIGHEST)

    def stacked(self, levels: Sequence[float]) -> Tensor:
        """float32."""
        return torch.tensor(levels, dtype=torch.float32)

    def noisy(self, latents_BCHW: Tensor, noise_BCHW: Tensor, level_B: Tensor) -> Tensor:
        """(1 - σ) x_0 + σ eps; 1 - σ is formed in float64."""
        sigma = level_B.double()
        return per_sample(1 - sigma, latents_BCHW) * latents_BCHW + per_sample(sigma, latents_BCHW) * noise_BCHW

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, level_B: Tensor) -> Tensor:
        """eps - x_0, whatever the level."""
        return noise_BCHW - latents_BCHW

    def denoised(self, noisy_BCHW: Tensor, prediction_BCHW: Tensor, level_B: Tensor, next_B: Tensor) -> Tensor:
        """Along the straight line: a step of Euler's method."""
        return noisy_BCHW + per_sample(next_B.double() - level_B.double(), noisy_BCHW) * prediction_BCHW

    def signal_to_noise(self, level_B: Tensor) -> Tensor:
        """((1 - σ) / σ)²."""
        sigma = level_B.double()
        return ((1 - sigma) / sigma).square()

    def share(self, level_B: Tensor) -> Tensor:
        """σ."""
        return level_B.double()

    def bins(self, count: int) -> list[str]:
        """In thousandths of σ: "000-199" …"""
        return range_names(self.steps, count)

    def bin_of(self, level_B: Tensor, count: int) -> Tensor:
        return (level_B.double() * count).long().clamp(max=count - 1)

    def scheduler(self, sampler: str) -> Scheduler:
        """One with the same shift; where that depends on the resolution, `set_timesteps` is given mu = log(shift)."""
        import diffusers

        settings: dict[str, object] = {"shift": self.shift}
        if isinstance(self.shift, StepsShift):
            settings = {"use_dynamic_shifting": True}
        if isinstance(self.shift, ResolutionShift):
            settings = {
                "use_dynamic_shifting": True,
                "base_image_seq_len": self.shift.few_tokens,
                "max_image_seq_len": self.shift.many_tokens,
                "base_shift": self.shift.mu_of_few,
                "max_shift": self.shift.mu_of_many,
            }
        return getattr(diffusers, _SAMPLERS[sampler])(num_train_timesteps=self.steps, **settings)
