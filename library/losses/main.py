"""The main loss: the distance of predictions from their targets, by element, with masks and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.diffusion.process import per_sample
from library.gpu import to_device
from library.losses.term import LossTerm

if TYPE_CHECKING:
    from library.data.dataset import Batch
    from library.diffusion.process import Predicted


@dataclass(frozen=True)
class MainLoss(LossTerm):
    """loss: (prediction, target) → loss per element, or with `thresholds` (prediction, target, threshold).

    thresholds, weights: functions of the noise levels [B]; weights of None are 1.
    """

    loss: Callable[..., Tensor]
    thresholds: Callable[[Tensor], Tensor] | None = None
    weights: Callable[[Tensor], Tensor] | None = None

    def by_element(self, prediction_BCHW: Tensor, target_BCHW: Tensor, level_B: Tensor) -> Tensor:
        """The loss of each element, [B, C, h, w], without any weight."""
        if self.thresholds is None:
            return self.loss(prediction_BCHW, target_BCHW)
        return self.loss(prediction_BCHW, target_BCHW, per_sample(self.thresholds(level_B), prediction_BCHW))

    def unweighted(self, seen: Predicted, masks: Tensor | None) -> Tensor:
        """The mean loss of each sample, [B], without the weights of samples and noise levels.

        masks: [B, 1, h, w] in 0 … 1, of the latents' size or the pixels'.
        """
        # fp32: squares of bf16 differences lose the small errors that matter late in training
        by_element = self.by_element(seen.prediction_BCHW.float(), seen.target_BCHW.float(), seen.level_B)
        if masks is not None:
            # what is masked counts as zero and stays in the mean, as in kohya: a small part weighs less than a whole
            # image
            masks = to_device(masks, by_element.device).to(by_element)
            by_element = by_element * torch.nn.functional.interpolate(masks, size=by_element.shape[2:], mode="area")
        return by_element.mean(dim=(1, 2, 3))

    def of_levels(self, level_B: Tensor, like: Tensor) -> Tensor | None:
        """The weights of the noise levels, [B], as `like`; None where there are none."""
        return None if self.weights is None else to_device(self.weights(level_B), like.device).to(like)

    def per_sample(self, seen: Predicted, batch: Batch) -> Tensor:
        """Each sample weighted by its own weight and by its noise level's."""
        losses = self.unweighted(seen, batch.masks)
        weights = to_device(batch.loss_weights, losses.device)
        of_levels = self.of_levels(seen.level_B, weights)
        return losses * (weights if of_levels is None else weights * of_levels)
