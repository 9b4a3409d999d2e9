"""Distillation (Hinton et al. 2015, arXiv:1503.02531; Li and Hoiem 2016, arXiv:1606.09282): on what is newly learnt the
network stays near the predictions of the network that the run goes on from.

The teacher's temperature has no meaning for predictions of noise: they are no probabilities.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.gpu import to_device
from library.losses.main import MainLoss
from library.losses.preservation import Active, prediction_of
from library.losses.term import LossTerm

if TYPE_CHECKING:
    from library.data.dataset import Batch
    from library.diffusion.process import Predict, Predicted


def factor(schedule: str, done: float) -> float:
    """The share of the weight that is left when this share of the run is done, in [0, 1]."""
    if schedule == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1.0


class Distillation(LossTerm):
    """weight · factor(schedule, done) · loss(prediction, the teacher's), added to each sample's main loss, with the
    weights of samples and noise levels. `done` is set from outside, before each step.
    """

    def __init__(self, predict: Predict, teacher: Active, main: MainLoss, *, weight: float, schedule: str) -> None:
        self._predict, self._teacher, self._main = predict, teacher, main
        self._weight, self._schedule = weight, schedule
        self.done = 0.0

    def per_sample(self, seen: Predicted, batch: Batch) -> Tensor | None:
        weight = self._weight * factor(self._schedule, self.done)
        if weight == 0:
            return None
        rows = torch.arange(len(batch.samples), device=seen.noisy_BCHW.device)
        target = prediction_of(self._teacher, self._predict, seen, rows)
        by_element = self._main.by_element(seen.prediction_BCHW.float(), target.float(), seen.level_B)
        losses = by_element.mean(dim=(1, 2, 3))
        weights = to_device(batch.loss_weights, losses.device)
        of_levels = self._main.of_levels(seen.level_B, losses)
        return weight * losses * (weights if of_levels is None else weights * of_levels)
