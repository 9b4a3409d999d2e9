"""LoRA-FA: LoRA with a frozen random `down` (Zhang et al. 2023, arXiv 2308.03303).

`--network_module networks.lora_fa`, as kohya's. Half of the numbers to train and to keep optimizer states of; a Linear
layer keeps r values of each token for the backward pass instead of all of its inputs. Files are plain LoRA.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

from torch import nn

from networks.adapter import generator_for
from networks.lora import DOWN, UP, LoRA
from networks.settings import RankSettings as Settings
from networks.settings import RankSizes as Sizes


class LoRAFA(LoRA):
    """`down` is a buffer: in states and files, and in no group of an optimizer."""

    NAME = "lora_fa"
    NOUN = "plain LoRA"
    NAMES = (DOWN, UP)
    READS: ClassVar[tuple[str, ...]] = ("lora",)
    FROZEN = (DOWN,)
    ROLES = MappingProxyType({UP: "up"})
    SETTINGS = Settings
    SIZES = Sizes

    def initialise(self) -> None:
        """`down` N(0, 2 / (in + r)), in: the layer's channels."""
        std = (2 / (self.site.module.weight.shape[1] + self.rank)) ** 0.5
        nn.init.normal_(self.lora_down.weight, std=std, generator=generator_for(self, "lora_down"))
        nn.init.zeros_(self.lora_up.weight)

    def shrink(self, ratio: float) -> None:
        """`down` stays as it is."""
        self.lora_up.weight.mul_(ratio)
