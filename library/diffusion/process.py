"""A diffusion process: how noise is added to latents at a noise level, and what the network predicts.

A noise level is a number in the process's own unit: a timestep 0 … 999 of DDPM (int64), σ in 0 … 1 of flow matching
(float32). Only the processes, and the model families, whose networks get it as input, interpret it. Options and reports
count in steps (`--min_timestep`, "t 300", "000-199"), of which every process has `steps`; `at` converts them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.diffusion.levels import Density

Predict = Callable[["Tensor", "Tensor", "Mapping[str, Tensor]"], "Tensor"]
"""A family's `predict`: (noisy latents [B, C, h, w], level [B] on their device, condition) → of the latents' shape."""

Scheduler: TypeAlias = Any
"""A scheduler of diffusers, which has no types."""

SAMPLINGS = ("sigma", "uniform", "sigmoid")
"""The ways of --timestep_sampling that are for every process."""


class Process(Protocol):
    """The interface that training, validation and sampling use. `level_B` is one noise level per sample, [B]."""

    @property
    def prediction_type(self) -> str:
        """The target of the network: "epsilon", "v_prediction" or "velocity" (of flow matching)."""
        ...

    @property
    def steps(self) -> int:
        """The steps in which options and reports count the levels, from the least noise to the most."""
        ...

    @property
    def samplers(self) -> Sequence[str]:
        """The names of --sample_sampler that work for this process; the first is the default."""
        ...

    @property
    def samplings(self) -> Sequence[str]:
        """The ways of --timestep_sampling that work for this process."""
        ...

    def at(self, step_B: Tensor) -> Tensor:
        """The levels at these steps, whole numbers in 0 … `steps` - 1."""
        ...

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
        """One level between the steps `low` and `high`. density: draws the position in that range, None is uniform.

        size: (height, width) of the latents, for processes whose levels depend on the resolution. sampling: one of
        `samplings`, for those that shift what is drawn.
        """
        ...

    def stacked(self, levels: Sequence[float]) -> Tensor:
        """Drawn levels as a tensor [B] on the CPU."""
        ...

    def noisy(self, latents_BCHW: Tensor, noise_BCHW: Tensor, level_B: Tensor) -> Tensor:
        """The latents with this much noise, in their dtype."""
        ...

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, level_B: Tensor) -> Tensor:
        """The target of the network's prediction for `noisy` of the same arguments."""
        ...

    def denoised(self, noisy_BCHW: Tensor, prediction_BCHW: Tensor, level_B: Tensor, next_B: Tensor) -> Tensor:
        """The latents at the levels `next_B`, from those at `level_B` and the network's prediction for them: a step
        without fresh noise."""
        ...

    def signal_to_noise(self, level_B: Tensor) -> Tensor:
        """The ratio of the variances of signal and noise, float64; 0 where there is only noise."""
        ...

    def share(self, level_B: Tensor) -> Tensor:
        """Where the level lies between the least noise, 0, and the most, 1; float64."""
        ...

    def bins(self, count: int) -> list[str]:
        """The names of `count` equal ranges of levels in reports, in steps: "000-199" …"""
        ...

    def bin_of(self, level_B: Tensor, count: int) -> Tensor:
        """Which of these ranges each level lies in, int64."""
        ...

    def scheduler(self, sampler: str) -> Scheduler:
        """diffusers' scheduler of this name of `samplers`, which solves this process's equation."""
        ...


class Predicted(NamedTuple):
    """One prediction of the network and what belongs to it; each [B, …]."""

    prediction_BCHW: Tensor
    target_BCHW: Tensor
    noisy_BCHW: Tensor
    level_B: Tensor  # as it was drawn, on the CPU
    condition: Mapping[str, Tensor]


def predict_and_target(
    process: Process,
    predict: Predict,
    latents_BCHW: Tensor,
    noise_BCHW: Tensor,
    level_B: Tensor,
    condition: Mapping[str, Tensor],
    *,
    added_BCHW: Tensor | None = None,
) -> Predicted:
    """The network's prediction for noisy latents, and its target: for training and every measurement.

    level_B: on the CPU. added_BCHW: the added noise, if it differs from the noise to predict (input perturbation).
    """
    from library.gpu import to_device

    noisy = process.noisy(latents_BCHW, noise_BCHW if added_BCHW is None else added_BCHW, level_B)
    target = process.target(latents_BCHW, noise_BCHW, level_B)
    prediction = predict(noisy, to_device(level_B, latents_BCHW.device), condition)
    return Predicted(prediction, target, noisy, level_B, condition)


BINS = 5  # of the noise levels, of equal width: for validation and reports


def middles(low: int, high: int) -> tuple[int, ...]:
    """The middle of each of five equal parts of the steps low … high - 1; fewer if there are fewer steps."""
    return tuple(dict.fromkeys(low + (2 * part + 1) * (high - low) // (2 * BINS) for part in range(BINS)))


def range_names(steps: int, count: int) -> list[str]:
    """ "000-199" …: `count` equal ranges of the steps."""
    edges = [steps * i // count for i in range(count + 1)]
    return [f"{low:03d}-{high - 1:03d}" for low, high in itertools.pairwise(edges)]


def per_sample(values_B: Tensor, like: Tensor) -> Tensor:
    """One number per sample in the shape [B, 1, …] of `like`, on its device and in its dtype."""
    from library.gpu import to_device

    shaped = values_B.view(-1, *[1] * (like.ndim - 1))
    return to_device(shaped.to(like.dtype), like.device)
