"""Grams: gradient descent with adaptive momentum scaling (Cao, Li, Song 2024, arXiv 2412.17107)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..setting import setting
from ..technique import Step, Technique

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Grams(Technique):
    """Takes the direction from the gradient and the size from the momentum."""

    use_grams: bool = setting(False, help="take the direction from the gradient, the size from the momentum")

    name = "Grams"
    papers = ("2412.17107",)
    excludes: ClassVar = {
        "use_cautious": "with Grams there is nothing for Cautious to mask; with both on, only Grams is used"
    }

    def direction(self, u: Tensor, step: Step) -> Tensor:
        return redirect(u, step.grad)


def redirect(update: Tensor, grad: Tensor) -> Tensor:
    """sign(g) |u|: the momentum decides the size, the gradient the direction."""
    return grad.sign() * update.abs()
