"""The loss of a batch as a list of terms, one file each: the main loss, preservation of the base, and so on.

The terms are called in their order. First each may replace the targets of some samples, as preservation does; then the
terms' losses are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.dataset import Batch
    from library.diffusion.process import Predicted


class LossTerm:
    """One term. A subclass overrides what it needs."""

    def target(self, seen: Predicted, batch: Batch) -> Tensor:
        """The targets of the prediction, [B, C, h, w]: unchanged, or replaced for some samples."""
        return seen.target_BCHW

    def per_sample(self, seen: Predicted, batch: Batch) -> Tensor | None:
        """The term's part of each sample's loss, [B], with all weights; None: it only changes targets."""
        return None


def total(terms: Sequence[LossTerm], seen: Predicted, batch: Batch) -> Tensor:
    """The loss of each sample, [B]: the sum of the terms."""
    for term in terms:
        seen = seen._replace(target_BCHW=term.target(seen, batch))
    found = [loss for term in terms if (loss := term.per_sample(seen, batch)) is not None]
    return found[0] if len(found) == 1 else torch.stack(found).sum(dim=0)
