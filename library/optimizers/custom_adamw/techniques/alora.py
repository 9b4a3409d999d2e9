"""ALoRA: ALLoRA's row-wise rate for lora_up (Huang, Balestriero 2024, arXiv 2410.09692) with LoRA+'s larger rate for
lora_up than for lora_down (Hayou, Ghosh, Yu 2024, arXiv 2402.12354).

Row i of lora_up B (out, r) moves with

    f_i = ratio / sqrt(1 + eta^2 scale ||(B A)_i||),     scale = alpha / rank

times the step: `ratio` times faster while the row of Delta W = scale B A is zero, slower as it grows. lora_down moves
with factor 1. ALLoRA scales the gradient by 1 / sqrt(||row|| + 1 / eta^2); Adam cancels a constant factor of the
gradient, so the factor is put on the step, normalised to `ratio` at zero. Weight decay keeps the plain rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..setting import setting
from ..technique import Step, Technique

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ALoRA(Technique):
    """Gives lora_up a higher rate than lora_down, which falls row by row as the row grows."""

    use_alora: bool = setting(False, help="give lora_up a higher rate, less where the adapter has grown")
    alora_ratio: float = setting(2.0, above=0, help="how much higher, at the start")
    alora_eta: float = setting(2.0, minimum=0, help="how fast that rate falls as the adapter grows")
    lora_scale: float = setting(1.0, minimum=0, help="alpha / rank", of_group=True)
    lora_plus_ratio: float | None = setting(
        None, above=0, help="LoRA+'s ratio, which is in the group's rate already", of_group=True
    )

    name = "ALoRA"
    papers = ("2410.09692", "2402.12354")
    reads_down = True

    def unmet(self, hint: str) -> str:
        return f"ALoRA needs LoRA pairs and found none ({hint}); it does nothing"

    def remark(self) -> str:
        with_ratio = "groups with a LoRA+ ratio keep it; alora_ratio is not multiplied on top"
        return with_ratio if self.lora_plus_ratio is not None else ""

    def size(self, u: Tensor, step: Step) -> Tensor:
        assert step.down is not None
        rank = step.down.shape[1]
        # in a group with LoRA+ the row-wise part stays, but the ratio must not be applied twice
        ratio = self.alora_ratio if self.lora_plus_ratio is None else 1.0
        up = step.weight.unflatten(-1, (-1, rank))
        factors = row_factors(up, step.down, ratio=ratio, eta=self.alora_eta, scale=self.lora_scale)
        return (factors.unsqueeze(-1) * u.unflatten(-1, (-1, rank))).flatten(1)


def row_norms(up: Tensor, down: Tensor) -> Tensor:
    """||(B A)_i|| [k, out] for up [k, out, r] and down [k, r, in], without forming B A.

    The Gram trick: ||(B A)_i||^2 = b_i (A A^T) b_i^T needs an r x r matrix only.
    """
    gram = down @ down.mT
    return ((up @ gram) * up).sum(-1).clamp(min=0).sqrt()


def row_factors(up: Tensor, down: Tensor, *, ratio: float, eta: float, scale: float) -> Tensor:
    """f [k, out] for up [k, out, r] and down [k, r, in]."""
    return ratio / (1 + eta**2 * scale * row_norms(up, down)).sqrt()
