"""Elastic weight consolidation of an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Consolidation:
    """strength / 2 · Σ F_i (w_i - w*_i)², a penalty on leaving what earlier data need (Kirkpatrick et al. 2017,
    arXiv:1612.00796).

    w*: the weights at the start. F_i: the mean over earlier samples of the squared gradient of one sample's loss. The
    gradient of the penalty is added to that of the loss, so the losses that are told are those without it.
    """

    def __init__(self, parameters: Sequence[Tensor], strength: float) -> None:
        self.parameters, self.strength = parameters, strength
        self.anchor = [parameter.detach().clone() for parameter in parameters]
        self.fisher = [torch.zeros_like(parameter) for parameter in parameters]

    def measure(self, losses: Iterable[Tensor]) -> None:
        """Set F from the losses of earlier samples, one each; they may be computed as they are asked for."""
        count = 0
        for loss in losses:
            count += 1
            grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            for total, grad in zip(self.fisher, grads, strict=True):
                if grad is not None:
                    total += grad.square()
        for total in self.fisher:
            total /= max(1, count)

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add strength · F_i (w_i - w*_i) to the gradients."""
        for parameter, fisher, anchor in zip(self.parameters, self.fisher, self.anchor, strict=True):
            if parameter.grad is not None:
                parameter.grad += self.strength * fisher * (parameter - anchor)

    @torch.no_grad()
    def penalty(self) -> float:
        terms = zip(self.parameters, self.fisher, self.anchor, strict=True)
        return self.strength / 2 * sum((f * (w - start).square()).sum().item() for w, f, start in terms)
