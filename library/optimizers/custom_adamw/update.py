"""One step of CustomAdamW for the rows of a matrix: every row is one whole parameter, all have the same shape.

This is the specification. A single parameter is a matrix with one row; the batched tier gives it all parameters of a
shape at once; the native kernel (kernel/) walks through the same list. With everything off it is AdamW: the same
operations in the same order as torch's, and the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import adopt, agr, cautious, grams, orthograd, spd, tam
from .options import Rates, Recipe


class Moments(NamedTuple):
    """What a step reads and writes besides the weights; n numbers or one for each of k tensors."""

    exp_avg: Tensor  # m [k, n]
    exp_avg_sq: Tensor  # v [k, n]
    adopt_k: Tensor | None = None  # [k, 1], updates since v was seeded
    tam_s: Tensor | None = None  # [k, 1], smoothed alignment


def update(
    w: Tensor,
    g: Tensor,
    moments: Moments,
    *,
    recipe: Recipe,
    rates: Rates,
    anchor: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """New weights and moments. `w`, `g` [k, n] in the moments' type; `anchor` [k, n] for SPD (None: zero);
    `factor` [k, n] or broadcastable: ALoRA's row factors."""
    m, v, k, s = moments
    # 0  the untouched gradient and weights, for SPD
    raw, start = g, w
    # 1  AGR
    if recipe.agr:
        g = agr.regularize(g)
    # 2  perpGrad, after AGR: the other way round AGR would spoil the right angle
    if recipe.orthograd:
        g = orthograd.project(w, g)
    # 3  ADOPT normalises by the previous second moment
    normalized = g
    if recipe.adopt:
        assert k is not None
        normalized = adopt.normalize(g, v, k, eps=recipe.adopt_eps, clip=recipe.adopt_clip)
    # 4  TAM damps what enters the momentum, by its alignment with the previous momentum
    entering = normalized
    if recipe.tam:
        assert s is not None
        s = tam.smooth(s, tam.alignment(m, normalized), recipe.tam_beta)
        t = rates.step if k is None else k.clamp(min=1)
        d = tam.damping(tam.unbias(s, recipe.tam_beta, t) if recipe.tam_bias_correction else s)
        entering = (tam.EPS + d) * normalized
    # 5  first moment
    m = m.lerp(entering, 1 - recipe.beta1)
    # 6, 7  second moment and update. The update carries the learning rate: all that follows is proportional to it,
    # and AdamW multiplies in this order
    v = (v * recipe.beta2).addcmul(g, g, value=1 - recipe.beta2)
    u = rates.lr * m if recipe.adopt else rates.step_size * m / (v.sqrt() / rates.root_correction + recipe.eps)
    # 8  Grams or Cautious, against the gradient after 1 and 2
    if recipe.direction == "grams":
        u = grams.redirect(u, g)
    elif recipe.direction == "cautious":
        u = cautious.mask(u, g, least=recipe.cautious_min)
    # 9  ALoRA
    if factor is not None:
        u = factor * u
    # 10  decoupled weight decay, with the plain rate
    w = w * rates.decay - u
    # 11  SPD
    if recipe.spd:
        w = spd.project(w, start, raw, anchor, strength=recipe.spd_lambda)
    after = Moments(m, v, k, s)
    return _seed(start, w, g, moments, after) if recipe.adopt else (w, after)


def _seed(start: Tensor, w: Tensor, g: Tensor, before: Moments, after: Moments) -> tuple[Tensor, Moments]:
    """ADOPT: rows whose second moment is not seeded yet stand still, and their v becomes g^2 (0 while g is 0)."""
    assert before.adopt_k is not None
    seeded = adopt.is_seeded(before.adopt_k)
    s = after.tam_s
    return w.where(seeded, start), Moments(
        exp_avg=after.exp_avg.where(seeded, before.exp_avg),
        exp_avg_sq=after.exp_avg_sq.where(seeded, g * g),
        adopt_k=adopt.count(before.adopt_k, g),
        tam_s=None if s is None else s.where(seeded, before.tam_s),
    )
