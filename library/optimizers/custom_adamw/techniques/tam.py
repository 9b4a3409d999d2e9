"""TAM: torque-aware momentum (Malviya et al. 2024, arXiv 2412.18790).

    S_t = <m_{t-1}, g_t> / (||m_{t-1}|| ||g_t||);  s_t = gamma s_{t-1} + (1 - gamma) S_t;  d_t = (1 + s_t) / 2
    m_t = b1 m_{t-1} + (1 - b1) (eps + d_t) g_t

One number per tensor. Deviation: the paper's momentum has no factor (1 - b1); here it stays Adam's average, so that
d = 1 is AdamW. With ADOPT, its normalised gradient takes the place of g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..setting import setting
from ..technique import Buffer, Step, Technique, norm

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-8


@dataclass(frozen=True)
class TAM(Technique):
    """Damps gradients that turn against the momentum."""

    use_tam: bool = setting(False, help="damp gradients that turn against the momentum")
    tam_beta: float = setting(0.9, minimum=0, below=1, help="memory of that damping")
    tam_bias_correction: bool = setting(False, help="correct that memory for its start at zero")

    name = "TAM"
    papers = ("2412.18790",)

    def buffers(self) -> tuple[Buffer, ...]:
        return (Buffer("tam_s"),)

    def entering(self, x: Tensor, step: Step) -> Tensor:
        s = smooth(step.before["tam_s"], alignment(step.before["exp_avg"], x), self.tam_beta)
        step.after["tam_s"] = s
        d = damping(unbias(s, self.tam_beta, step.updates) if self.tam_bias_correction else s)
        return (EPS + d) * x


def alignment(exp_avg: Tensor, grad: Tensor) -> Tensor:
    """S [k, 1], the cosine of the previous momentum and the gradient for rows [k, n]; 0 where either is zero."""
    dot = (exp_avg * grad).sum(-1, keepdim=True)
    lengths = norm(exp_avg) * norm(grad)
    return dot / lengths.where(lengths > 0, 1)


def smooth(s: Tensor, alignment: Tensor, gamma: float) -> Tensor:
    """s_t = gamma s_{t-1} + (1 - gamma) S_t."""
    return gamma * s + (1 - gamma) * alignment


def unbias(s: Tensor, gamma: float, t: Tensor | float) -> Tensor:
    """s_t / (1 - gamma^t): with it a gamma of 0.999 does not begin with a thousand halved steps."""
    return s / (1 - gamma**t)


def damping(s: Tensor) -> Tensor:
    """d = (1 + s) / 2: 1 for a gradient along the momentum, 0 against it."""
    return (1 + s) / 2
