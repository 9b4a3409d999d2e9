"""T-LoRA: a LoRA of which the noisier images train fewer ranks (Soboleva et al. 2025, arXiv 2507.05964, "vanilla").

`--network_module networks.t_lora`. Large noise levels decide the composition, and a few training images are learned by
heart there first. In training an image at the noise level t of T steps passes through the first
⌊((T − t) / T)^noise_power · (r − min_rank)⌋ + min_rank ranks of the denoiser's layers; the text encoders, which see no
noise, keep all. Outside of training all ranks act, as in every program that loads the file, which is a plain LoRA. (The
paper also draws images so; no program does. Its orthogonal variant needs the base's weights to be loaded.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from library.errors import UserError
from networks.adapter import Adapter
from networks.lora import DOWN, UP, LoRA
from networks.settings import RankSettings
from networks.settings import RankSizes as Sizes


@dataclass(frozen=True, kw_only=True)
class Settings(RankSettings):
    """min_rank: the ranks that pure noise trains; None: half of the rank, rounded up, the paper's. noise_power: above 1
    the ranks fall faster with the noise."""

    min_rank: int | None = None
    noise_power: float = 1.0


class TLoRA(LoRA):
    """The pair of a LoRA; in training as many of its ranks as an image's noise leaves."""

    NAME = "t_lora"
    NOUN = "plain LoRA"
    NAMES = (DOWN, UP)
    READS: ClassVar[tuple[str, ...]] = ("lora",)
    SETTINGS = Settings
    SIZES = Sizes

    least, power = 1, 1.0
    _mask: Tensor | None = None  # [B, r], of the batch

    def take(self, settings: RankSettings) -> None:
        super().take(settings)
        assert isinstance(settings, Settings)
        self.least = (self.rank + 1) // 2 if settings.min_rank is None else settings.min_rank
        self.power = settings.noise_power
        if not 1 <= self.least <= self.rank:
            raise UserError(f"min_rank: {self.least} is not in 1 … {self.rank}, the rank of {self.site.name}")
        if not self.power > 0:
            raise UserError(f"noise_power: {self.power:g} is not above 0")
        self.drops = True  # so that `_drop` is called

    @classmethod
    def at_noise(cls, adapters: Sequence[Adapter], share_B: Tensor) -> None:
        masks: dict[tuple[int, int, float], Tensor] = {}
        for adapter in adapters:
            assert isinstance(adapter, TLoRA)
            if adapter.site.part == "unet":
                key = adapter.rank, adapter.least, adapter.power
                if key not in masks:
                    masks[key] = mask_of(share_B, *key).to(adapter.alpha.device)
                adapter._mask = masks[key]

    def _drop(self, hidden: Tensor) -> Tensor:
        hidden = super()._drop(hidden)
        if self._mask is None:
            return hidden
        shape = [1] * hidden.ndim
        shape[0], shape[self.rank_axis] = self._mask.shape
        return hidden * self._mask.view(shape).to(hidden.dtype)


def mask_of(share_B: Tensor, rank: int, least: int, power: float) -> Tensor:
    """Which ranks act, [B, rank]. share_B: the noise levels as shares of the highest, in [0, 1]."""
    act = ((1 - share_B.double()) ** power * (rank - least)).floor() + least
    return torch.arange(rank) < act[:, None]
