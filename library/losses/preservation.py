"""Prior preservation: the network should change nothing on some samples, or outside a sample's mask, so the target
there is the prediction of a prior: the base model's own, or that of the network which the run goes on from.

`diff_output_preservation` of kohya's trainer and ai-toolkit, `PRIOR_PREDICTION` of OneTrainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from library.gpu import to_device
from library.losses.main import MainLoss
from library.losses.term import LossTerm

if TYPE_CHECKING:
    from library.data.dataset import Batch
    from library.diffusion.process import Predict, Predicted

Active = Callable[[], AbstractContextManager[None]]
"""A context in which the network is another one: the base alone, or itself as it was."""


@torch.no_grad()
def prediction_of(active: Active, predict: Predict, seen: Predicted, rows: Tensor) -> Tensor:
    """The prediction of another network for these rows of a batch, [rows, C, h, w], as the target's dtype."""
    condition = {name: value[rows] for name, value in seen.condition.items()}
    levels = to_device(seen.level_B, rows.device)[rows]
    with active():
        return predict(seen.noisy_BCHW[rows], levels, condition).to(seen.target_BCHW)


@dataclass(frozen=True)
class Preservation(LossTerm):
    """predict: of the family. priors: the contexts of "base" and "previous". main: the loss outside of masks."""

    predict: Predict
    priors: Mapping[str, Active]
    main: MainLoss

    def target(self, seen: Predicted, batch: Batch) -> Tensor:
        """The targets, with the prior's prediction for the samples that are preserved as a whole."""
        target = seen.target_BCHW
        for prior, active in self.priors.items():
            if places := _places(batch, prior, region="all"):
                rows = to_device(torch.tensor(places), seen.noisy_BCHW.device)
                target = target.index_copy(0, rows, prediction_of(active, self.predict, seen, rows))
        return target

    def per_sample(self, seen: Predicted, batch: Batch) -> Tensor | None:
        """prior_weight · mean((1 - mask) · loss(prediction, the prior's)), with the weights of samples and noise
        levels, for the samples that are preserved outside of their masks; 0 for the others. The main loss has the part
        inside.
        """
        found: Tensor | None = None
        for prior, active in self.priors.items():
            places = _places(batch, prior, region="outside_mask")
            if not places or batch.masks is None:
                continue
            rows = to_device(torch.tensor(places), seen.noisy_BCHW.device)
            target = prediction_of(active, self.predict, seen, rows)
            level = seen.level_B[places]
            by_element = self.main.by_element(seen.prediction_BCHW[rows].float(), target.float(), level)
            masks = to_device(batch.masks[places], by_element.device).to(by_element)
            outside = 1 - interpolate(masks, size=by_element.shape[2:], mode="area")
            losses = (by_element * outside).mean(dim=(1, 2, 3))
            strength = [batch.samples[i].sample.subset.prior_weight for i in places]
            weights = to_device(batch.loss_weights[places] * torch.tensor(strength), losses.device).to(losses)
            of_levels = self.main.of_levels(level, losses)
            losses = losses * (weights if of_levels is None else weights * of_levels)
            found = losses.new_zeros(len(batch.samples)) if found is None else found
            found = found.index_add(0, rows, losses)
        return found


def _places(batch: Batch, prior: str, *, region: str) -> list[int]:
    """The rows of the samples with this prior and region."""
    subsets = [draw.sample.subset for draw in batch.samples]
    return [i for i, one in enumerate(subsets) if one.prior == prior and one.prior_region == region]
