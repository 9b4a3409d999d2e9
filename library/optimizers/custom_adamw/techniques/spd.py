"""SPD: selective projection decay (Tian, Huang, Kira, NeurIPS 2024, arXiv 2411.01713).

Decays a tensor toward its anchor w0 only if the gradient step points there, too: c_t = -<g_t, w_{t-1} - w0> < 0. For
adapters w0 = 0, and since <g_A, A> = <g_B, B> = <G, BA> both halves of a LoRA pair decide alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..setting import setting
from ..technique import About, Buffer, Step, Technique, norm

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SPD(Technique):
    """Decays a tensor toward zero if the gradient step points there, too, and at most by the step's own growth."""

    use_spd: bool = setting(True, help="use selective projection decay")
    spd_lambda: float = setting(0.06, minimum=0, maximum=1, help="strength of that decay")
    spd_anchor: Literal["zero", "initial"] = setting(
        "zero", help="decay toward zero, or toward the initial weights (stored as one more copy)"
    )

    name = "SPD"
    papers = ("2411.01713",)

    def applies(self, about: About) -> bool:
        return self.spd_lambda > 0

    def buffers(self) -> tuple[Buffer, ...]:
        anchor = Buffer("spd_anchor", per="number", as_weights=True, start=lambda parameter, _: parameter.detach())
        return (anchor,) if self.spd_anchor == "initial" else ()

    def known_to_kernel(self) -> bool:
        return self.spd_anchor == "zero"

    def project(self, w: Tensor, step: Step) -> Tensor:
        return project(w, step.weight, step.raw, step.before.get("spd_anchor"), strength=self.spd_lambda)


def condition(grad: Tensor, deviation: Tensor) -> Tensor:
    """c = -<g, w - w0> [k, 1] for rows [k, n]: the raw gradient, before the weights move."""
    return -(grad * deviation).sum(-1, keepdim=True)


def deviation_ratio(new: Tensor, old: Tensor) -> Tensor:
    """r = clip((||w~ - w0|| - ||w_{t-1} - w0||) / ||w~ - w0||, 0, 1) [k, 1]: the share of the radius that is new."""
    new_radius = norm(new)
    old_radius = norm(old)
    return ((new_radius - old_radius) / new_radius.where(new_radius > 0, 1)).clamp(0, 1)


def project(new: Tensor, old: Tensor, grad: Tensor, anchor: Tensor | None, *, strength: float) -> Tensor:
    """w~ - lambda r (w~ - w0) where c < 0, else w~. `strength` is lambda: not multiplied by the learning rate.

    lambda = 1 puts a tensor that moved outward back on its previous radius. Rows [k, n]; no `anchor` means zero.
    """
    if anchor is None:
        ratio = deviation_ratio(new, old)
        projected = new - strength * ratio * new
        away = old
    else:
        away = old - anchor
        ratio = deviation_ratio(new - anchor, away)
        projected = new - strength * ratio * (new - anchor)
    return projected.where(condition(grad, away) < 0, new)
