"""Samples with `diff_output_preservation`: the network should change nothing there, so their target is the base
model's own prediction. After kohya's trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.gpu import to_device
from library.losses.term import LossTerm

if TYPE_CHECKING:
    from library.data.dataset import Batch
    from library.diffusion.process import Predict, Predicted


@dataclass(frozen=True)
class Preservation(LossTerm):
    """predict: of the family. without: a context in which the network has no effect."""

    predict: Predict
    without: Callable[[], AbstractContextManager[None]]

    def target(self, seen: Predicted, batch: Batch) -> Tensor:
        """The targets, with the base's prediction for the samples that have the option, without a gradient."""
        rows = [i for i, draw in enumerate(batch.samples) if draw.sample.subset.diff_output_preservation]
        if not rows:
            return seen.target_BCHW
        device = seen.noisy_BCHW.device
        preserved = to_device(torch.tensor(rows), device)
        condition = {name: value[preserved] for name, value in seen.condition.items()}
        with torch.no_grad(), self.without():
            levels = to_device(seen.level_B, device)[preserved]
            unchanged = self.predict(seen.noisy_BCHW[preserved], levels, condition)
        return seen.target_BCHW.index_copy(0, preserved, unchanged.to(seen.target_BCHW))
