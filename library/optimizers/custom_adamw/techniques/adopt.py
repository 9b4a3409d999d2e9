"""ADOPT: modified Adam that converges with any beta2 (Taniguchi et al., NeurIPS 2024, arXiv 2411.02853).

The clipped version of November 2024. v starts as the square of the first gradient, and that step changes no weight;
from then on the gradient is divided by the root of the *previous* v, clipped, and only then enters the momentum:

    g^ = clip(g / max(sqrt(v_{k-1}), eps), -k^(1/4), k^(1/4));  m_k = b1 m_{k-1} + (1-b1) g^;  w <- w - lr m_k
    v_k = b2 v_{k-1} + (1-b2) g^2

Deviation: v is seeded by the first gradient that is not all zero, tensor by tensor. The gradient of lora_down is
exactly zero at the first step of a LoRA (lora_up = 0); seeding with it would leave eps as the only denominator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...groups import Options
from ..setting import setting
from ..technique import Buffer, Step, Technique

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ADOPT(Technique):
    """Divides by the second moment of the step before, clips, then averages (ADOPT)."""

    use_adopt_stability: bool = setting(False, help="normalise by the previous second moment, clipped (ADOPT)")
    adopt_eps: float = setting(1e-6, above=0, help="the least divisor of that normalisation")
    adopt_clip: float = setting(0.25, minimum=0, help="its k-th update is clipped at k to this power")

    name = "ADOPT"
    papers = ("2411.02853",)
    normalizes = True

    def buffers(self) -> tuple[Buffer, ...]:
        return (Buffer("adopt_k", start=_updates_so_far),)

    def entering(self, x: Tensor, step: Step) -> Tensor:
        k = step.before["adopt_k"]
        step.updates = k.clamp(min=1)
        return normalize(x, step.before["exp_avg_sq"], k, eps=self.adopt_eps, clip=self.adopt_clip)

    def settle(self, w: Tensor, step: Step) -> Tensor:
        """Rows whose second moment is not seeded yet keep their weights, and their v becomes g^2 (0 while g is 0)."""
        before, after, g = step.before, step.after, step.grad
        seeded = is_seeded(before["adopt_k"])
        step.after = {key: new.where(seeded, before[key]) for key, new in after.items() if key != "exp_avg_sq"}
        step.after["exp_avg_sq"] = after["exp_avg_sq"].where(seeded, g * g)
        step.after["adopt_k"] = count(before["adopt_k"], g)
        return w.where(seeded, step.weight)


def _updates_so_far(parameter: Tensor, state: Options) -> float:
    """The count of updates for moments of an AdamW without ADOPT, whose v is seeded."""
    return float(state["step"]) if "exp_avg" in state else 0.0


def normalize(grad: Tensor, exp_avg_sq: Tensor, k: Tensor, *, eps: float, clip: float) -> Tensor:
    """g^ for rows [k, n]: `exp_avg_sq` is the previous second moment, `k` [k, 1] counts the updates from 1.

    `eps` is a floor and not an addend; the bound is k ** clip.
    """
    bound = k.clamp(min=1) ** clip
    return (grad / exp_avg_sq.sqrt().clamp(min=eps)).clamp(-bound, bound)


def is_seeded(k: Tensor) -> Tensor:
    """Whether a row has seen a non-zero gradient in an earlier step; k [k, 1]."""
    return k > 0


def count(k: Tensor, grad: Tensor) -> Tensor:
    """The next k: 0 until the first non-zero gradient, 1 after that has seeded v, then one more at each update."""
    return k + (is_seeded(k) | (grad != 0).any(-1, keepdim=True))
