"""perpGrad, also called OrthoGrad (Prieto et al. 2025, arXiv 2501.04697)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..setting import setting
from ..technique import About, Step, Technique, norm

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-30


@dataclass(frozen=True)
class OrthoGrad(Technique):
    """Takes the part of the gradient that is orthogonal to the weights (⊥Grad).

    It comes after AGR, which would otherwise destroy the orthogonality. On lora_up it does harm: lora_up starts at zero
    and has to grow along itself.
    """

    use_orthogonal_grad: bool = setting(False, help="take the part of the gradient orthogonal to the weights")
    orthograd_target: Literal["down", "up", "all"] = setting(
        "down", help="for lora_down, for lora_up (which harms it) or for all parameters"
    )

    name = "OrthoGrad"
    papers = ("2501.04697",)

    def applies(self, about: About) -> bool:
        return self.orthograd_target in ("all", about.role)

    def unmet(self, hint: str) -> str:
        return (
            f"OrthoGrad is on for lora_{self.orthograd_target} only and found none ({hint}); it does nothing. "
            "orthograd_target='all' applies it to every parameter"
        )

    def gradient(self, g: Tensor, step: Step) -> Tensor:
        return project(step.weight, g)


def project(weight: Tensor, grad: Tensor) -> Tensor:
    """The part of `grad` that is orthogonal to `weight`, brought back to the length of `grad`; rows of [k, n].

        g_perp = g - <w,g> / (<w,w> + 1e-30) w;   g <- g_perp ||g|| / (||g_perp|| + 1e-30)

    The rescaling is the official code's; the paper's equation has none. Of a gradient parallel to its weight only
    round-off remains, which the rescaling would amplify to full length: such a row becomes zero instead.
    """
    along = (weight * grad).sum(-1, keepdim=True) / ((weight * weight).sum(-1, keepdim=True) + TINY)
    orthogonal = grad - along * weight
    length = norm(grad)
    rest = norm(orthogonal)
    return orthogonal * (length / (rest + TINY)).where(rest > round_off(grad) * length, 0)


def round_off(grad: Tensor) -> float:
    """The largest relative length of a parallel gradient after the projection: four units in the last place."""
    import torch

    return 4 * torch.finfo(grad.dtype).eps
