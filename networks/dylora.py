"""DyLoRA: a LoRA whose ranks are sorted, so that it can be cut to a lower one (Valipour et al. 2022, arXiv 2210.07558).

`--network_module networks.dylora`, as kohya's. Each forward in training draws a block of `unit` ranks: the ranks up to
its end act, with the strength s √(r / end), and the block alone gets a gradient, as in the paper. (An optimizer's
momentum and weight decay move the other ranks as well, since a layer's ranks lie in one tensor.) All ranks act outside
of training, so that files are plain LoRA and their alpha / r is the strength of the full rank. Cut to the first b
ranks, a file acts as those were trained with alpha * √(b / r) in place of alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from library.errors import UserError
from library.rng import uniform
from networks.lora import DOWN, UP, LoRA
from networks.settings import Asked, LayerSizes, RankSettings, RateSettings
from networks.settings import RankSizes as Sizes
from networks.sites import Site

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.models.blocks import Blocks


@dataclass(frozen=True, kw_only=True)
class Settings(RankSettings):
    """unit: the ranks that are trained at a time, a divisor of the rank; None: 1. block_size: LyCORIS' name of it."""

    unit: int | None = None
    block_size: int | None = None


class DyLoRA(LoRA):
    """The pair of a LoRA; in training a part of it."""

    NAME = "dylora"
    NOUN = "plain LoRA"
    NAMES = (DOWN, UP)
    READS: ClassVar[tuple[str, ...]] = ("lora",)
    SETTINGS = Settings
    SIZES = Sizes

    unit = 1

    @classmethod
    def new(
        cls, site: Site, asked: Asked, sizes: LayerSizes, settings: RateSettings, blocks: Blocks | None
    ) -> Self | None:
        """As kohya's: convolutions have the rank of the other layers."""
        assert isinstance(sizes, Sizes)
        dim = 4 if asked.dim is None else asked.dim
        if sizes.conv_dim not in (None, dim):
            raise UserError(f"conv_dim: {sizes.conv_dim}: networks.dylora wants the same as --network_dim, {dim}")
        return super().new(site, asked, sizes, settings, blocks)

    def take(self, settings: RankSettings) -> None:
        super().take(settings)
        assert isinstance(settings, Settings)
        if settings.unit is not None and settings.block_size is not None:
            raise UserError("unit and block_size: two names of one setting; give one of them")
        name, unit = ("block_size", settings.block_size) if settings.unit is None else ("unit", settings.unit)
        self.unit = 1 if unit is None else unit
        if self.unit < 1 or self.rank % self.unit:
            raise UserError(f"{name}: {self.unit} does not divide {self.rank}, the rank of {self.site.name}")

    def factors(self) -> tuple[Tensor, Tensor]:
        """In training the ranks up to a drawn block's end, whose last `unit` are trained."""
        down, up = super().factors()
        if not self.training:
            return down, up
        start = self.unit * int(uniform() * (self.rank // self.unit))
        end = start + self.unit
        down = torch.cat([down[:start].detach(), down[start:end]])
        return down * math.sqrt(self.rank / end), torch.cat([up[:, :start].detach(), up[:, start:end]], dim=1)
