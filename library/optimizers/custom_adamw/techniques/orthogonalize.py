"""Orthogonalised momentum: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; as a steepest descent:
Bernstein, Newhouse 2024, arXiv 2409.20325), with the size of Moonshot's form (Liu et al. 2025, arXiv 2502.16982).

    m_t = b1 m_{t-1} + (1 - b1) g;   y = b1 m_t + (1 - b1) g (Nesterov);   O = NS(y);   w <- w - lr s sqrt(max(a, b)) O

for a parameter as a matrix (a, b). NS brings the singular values of y near 1 and keeps its singular vectors, by five
steps of X <- 3.4445 X - 4.775 (X X^T) X + 2.0315 (X X^T)^2 X from X = y / ||y||_F: those above a five-hundredth of the
largest end between 0.68 and 1.14. So the numbers of an update have the root mean square s. There is no second moment:
half the state.

s = 0.5: with 1 the best rate of a LoRA is half of AdamW's (docs/optimizer.md), so a rate that suits AdamW suits this
one. Moonshot's s is 0.2, the root mean square of Adam's updates of a large model.

Vectors and single rows or columns that are no half of a LoRA pair have no directions to balance: they stay with AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..setting import setting
from ..technique import About, Step, Technique

if TYPE_CHECKING:
    from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)
STEPS = 5


@dataclass(frozen=True)
class Orthogonalize(Technique):
    """Replaces the momentum of a matrix by the nearest orthogonal one, without a second moment (Muon)."""

    orthogonalize: bool = setting(False, help="orthogonalise the momentum of matrices (Muon)")
    orthogonalize_scale: float = setting(0.5, above=0, help="root mean square of an update, in units of the rate")
    orthogonalize_nesterov: bool = setting(True, help="look ahead by one step of the momentum")

    name = "Muon"
    papers = ("2409.20325", "2502.16982")
    normalizes = True
    one_moment = True
    reads_matrix = True
    excludes: ClassVar = {
        "use_adopt_stability": "Muon has no second moment, so ADOPT has nothing to divide by; only Muon is used",
        "use_grams": "Grams' signs would undo Muon's orthogonal updates; only Muon is used",
    }

    def applies(self, about: About) -> bool:
        if len(about.shape) < 2 or about.numel == 0:
            return False
        return about.role != "" or min(about.shape[0], about.numel // about.shape[0]) > 1

    def unmet(self, hint: str) -> str:
        return "Muon needs matrices and found none; it does nothing"

    def leaving(self, m: Tensor, step: Step) -> Tensor:
        rows, columns = step.matrix
        matrix = (m.lerp(step.grad, 1 - step.beta1) if self.orthogonalize_nesterov else m).unflatten(
            -1, (rows, columns)
        )
        return orthogonal(matrix).flatten(1) * (self.orthogonalize_scale * max(rows, columns) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:
    """NS(x) for matrices [k, a, b]; zeros for a matrix of zeros. Its size has no influence on the result."""
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    peak = wide.abs().amax((-2, -1), keepdim=True)  # first: squares of small numbers would vanish
    wide = wide / peak.where(peak > 0, 1)
    length = wide.square().sum((-2, -1), keepdim=True).sqrt()
    wide = wide / length.where(length > 0, 1)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT
