"""Cautious optimizers (Liang, Chen, Liu, Liu 2024, arXiv 2411.16085)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..setting import setting
from ..technique import Step, Technique

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cautious(Technique):
    """Masks the entries of the update that go against the gradient, and scales up the rest."""

    use_cautious: bool = setting(True, help="mask updates that disagree with the gradient")
    cautious_min: float = setting(1e-3, above=0, maximum=1, help="the least mean of that mask that is rescaled")

    name = "Cautious"
    papers = ("2411.16085",)

    def direction(self, u: Tensor, step: Step) -> Tensor:
        return mask(u, step.grad, least=self.cautious_min)


def agreement(update: Tensor, grad: Tensor) -> Tensor:
    """1 where u g > 0, else 0; rows [k, n]. Signs, not products: those of two small numbers vanish in float32."""
    return (update.sign() * grad.sign() > 0).to(update.dtype)


def mask(update: Tensor, grad: Tensor, *, least: float) -> Tensor:
    """u mask / max(mean(mask), least): entries that disagree with the gradient become 0, the rest is scaled up.

    The scale of the authors' code (the paper's first version has n / (sum + 1)). The moments are not masked.
    """
    agree = agreement(update, grad)
    return update * (agree / agree.mean(-1, keepdim=True).clamp(min=least))
