"""ALoRA: ALLoRA's row-wise rate for lora_up (Huang, Balestriero 2024, arXiv 2410.09692) with LoRA+'s larger rate for
lora_up than for lora_down (Hayou, Ghosh, Yu 2024, arXiv 2402.12354).

Row i of lora_up B (out, r) moves with

    f_i = ratio / sqrt(1 + eta^2 scale ||(B A)_i||),     scale = alpha / rank

times the step: `ratio` times faster while the row of Delta W = scale B A is zero, slower as it grows. lora_down moves
with factor 1. ALLoRA scales the gradient by 1 / sqrt(||row|| + 1 / eta^2); Adam cancels a constant factor of the
gradient, so the factor is put on the step, normalised to `ratio` at zero. Weight decay keeps the plain rate.
"""

from __future__ import annotations

from torch import Tensor


def row_norms(up: Tensor, down: Tensor) -> Tensor:
    """||(B A)_i|| [k, out] for up [k, out, r] and down [k, r, in], without ever forming B A.

    The Gram trick: ||(B A)_i||^2 = b_i (A A^T) b_i^T needs an r x r matrix only.
    """
    gram = down @ down.mT
    return ((up @ gram) * up).sum(-1).clamp(min=0).sqrt()


def row_factors(up: Tensor, down: Tensor, *, ratio: float, eta: float, scale: float) -> Tensor:
    """f [k, out] for up [k, out, r] and down [k, r, in]."""
    return ratio / (1 + eta**2 * scale * row_norms(up, down)).sqrt()
