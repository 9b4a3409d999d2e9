"""Kinds whose factors are trained in a form of their own, and whose files are plain LoRA unless that form is kept.

Such a kind has `factors` and `matrices`, from which its plain pair follows, and `NAMES`, its own form's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from networks.lora import DOWN, UP, LoRA, pair_shapes
from networks.settings import OwnFormSettings, RankSettings, RankSizes


class OwnForm(LoRA):
    """A LoRA whose up and down follow from other tensors."""

    SETTINGS: ClassVar[type[RankSettings]] = OwnFormSettings
    SIZES: ClassVar[type[RankSizes]] = RankSizes
    keep_form = False

    def take(self, settings: RankSettings) -> None:
        super().take(settings)
        assert isinstance(settings, OwnFormSettings)
        self.keep_form = settings.keep_form

    @classmethod
    def lacking(cls, names: Collection[str]) -> str | None:
        return next((name for name in cls.NAMES if name not in names), None)

    def completed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What states alone have stays as it is in a new adapter."""
        own = {name: tensor for name, tensor in self.state_dict().items() if name not in (*self.NAMES, "alpha")}
        return {**own, **super().completed(tensors)}

    def export(self) -> dict[str, Tensor]:
        """Plain LoRA of the same scale; with keep_form the tensors of its own form, without what states hold more."""
        state = self.state_dict()
        if self.keep_form:
            return {name: tensor for name, tensor in state.items() if name in (*self.NAMES, "alpha")}
        return self.plain(state)

    def plain(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """down, up and alpha of a plain LoRA that acts as these tensors do."""
        weight = self.site.module.weight.shape
        down, up = self.matrices(tensors, weight)
        shapes = pair_shapes(weight, len(down))
        return {
            DOWN: down.reshape(tuple(shapes[DOWN])),
            UP: up.reshape(tuple(shapes[UP])),
            "alpha": torch.tensor(self.scale * len(down)),
        }
