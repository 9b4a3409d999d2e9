"""A made-up kind of adapter for tests: W + m * diag(v).

It shows what a new kind takes: this file, and one line in KINDS. `adapter_models.made_up_kind` adds both for a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from networks.adapter import Adapter, Shape
from networks.settings import Asked, RateSettings
from networks.settings import LayerSizes as Sizes
from networks.sites import Site


@dataclass(frozen=True, kw_only=True)
class Settings(RateSettings):
    """`--network_args`. diag_dropout: share of v that is left out in training, in [0, 1)."""

    diag_dropout: float = 0.0


class Diagonal(Adapter):
    NAME = "diagonal"
    NOUN = "diagonal adapters"
    NAMES = ("diag_v",)
    SETTINGS = Settings
    SIZES = Sizes

    diag_v: nn.Parameter
    dropped = 0.0

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        return {"diag_v": (min(weight[:2]),)}

    def initialise(self) -> None:
        nn.init.zeros_(self.diag_v)

    @classmethod
    def delta_of(cls, tensors: Mapping[str, Tensor], weight: Shape) -> Tensor:
        """On convolutions at the kernel's middle."""
        v = tensors["diag_v"].float()
        out, inputs, *kernel = weight
        diagonal = F.pad(torch.diag(v), (0, inputs - len(v), 0, out - len(v)))
        for size in reversed(kernel):
            diagonal = F.pad(diagonal[..., None], (size // 2, (size - 1) // 2))
        return diagonal if len(kernel) < 2 else diagonal.transpose(2, 3)

    @classmethod
    def as_in_file(cls, site: Site, tensors: Mapping[str, Tensor], asked: Asked, settings: RateSettings) -> Diagonal:
        assert isinstance(settings, Settings)
        if not 0 <= settings.diag_dropout < 1:
            raise UserError(f"diag_dropout: {settings.diag_dropout:g} is not in [0, 1)")
        made = super().as_in_file(site, tensors, asked, settings)
        made.dropped = settings.diag_dropout
        return made

    def delta_in_forward(self) -> Tensor:
        v = F.dropout(self.diag_v, self.dropped, self.training)
        return self.delta_of({"diag_v": v}, self.site.module.weight.shape)

    def shrink(self, ratio: float) -> None:
        self.diag_v.mul_(ratio)
