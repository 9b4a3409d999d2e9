"""Samples of a model that is trained by flow matching: Euler steps along the velocity that a family predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from library.diffusion.flow import Flow

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.models.family import ModelFamily


class FlowPipeline:
    """Called as `ModelFamily.pipeline` says; the result is diffusers' pipeline's for equal states and noise.

    The levels are 1, 1 - 1/n, …, 1/n before the shift of the family's process, as in diffusers' pipelines of FLUX.
    schedulers_levels: they are the scheduler's own, as in that of Stable Diffusion 3: equally far apart, from 1 to the
    shifted level of 1/1000, and then shifted (once more).
    """

    def __init__(self, family: ModelFamily, process: Flow, *, schedulers_levels: bool = False) -> None:
        self.family, self.process, self._schedulers_levels = family, process, schedulers_levels
        self.scheduler: Any = process.scheduler(process.samplers[0])

    def set_progress_bar_config(self, **settings: object) -> None:
        """No-op: it shows none."""

    def __call__(
        self,
        positive: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        width: int,
        height: int,
        generator: torch.Generator,
        output_type: str,
        embedded_guidance: float | None = None,
    ) -> SimpleNamespace:
        import torch

        assert output_type == "latent"
        space = self.family.latents
        rows, columns = height // space.factor, width // space.factor
        device = next(self.family.components["denoiser"].parameters()).device
        latents = torch.randn(1, space.channels, rows, columns, generator=generator).to(device)
        texts = [positive, negative] if guidance_scale != 1 else [positive]
        if embedded_guidance is not None:
            told = torch.full((1,), embedded_guidance, device=device)
            texts = [{**text, "guidance": told} for text in texts]
        self._set_levels(num_inference_steps, (rows, columns), device)
        for time in self.scheduler.timesteps:
            level = (time / self.process.steps).float().expand(1)
            found = [self.family.predict(latents, level, text).float() for text in texts]
            velocity = found[-1] + guidance_scale * (found[0] - found[-1])
            latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
        return SimpleNamespace(images=latents)

    def _set_levels(self, count: int, size: tuple[int, int], device: torch.device) -> None:
        if self._schedulers_levels:
            self.scheduler.set_timesteps(count, device=device)
            return
        settings: dict[str, object] = {"sigmas": [1 - step / count for step in range(count)]}
        if not isinstance(self.process.shift, float | int):
            settings["mu"] = math.log(self.process.shift_at(size, steps=count))
        self.scheduler.set_timesteps(device=device, **settings)
