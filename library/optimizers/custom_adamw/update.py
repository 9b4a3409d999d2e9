"""One step of CustomAdamW for the rows of a matrix: every row is one whole parameter, all have the same shape.

This is the specification. A single parameter is a matrix with one row; the batched tier gives it all parameters of a
shape at once; the native kernel (kernel/) walks through the same list. With everything off it is AdamW: the same
operations in the same order as torch's, and the same bits. Each technique's file defines the stages at which it acts;
at one stage the techniques act in the order of `TECHNIQUES`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .options import Rates, Recipe
from .technique import Step


def update(
    w: Tensor,
    g: Tensor,
    state: Mapping[str, Tensor],
    *,
    recipe: Recipe,
    rates: Rates,
    down: Tensor | None = None,
    matrix: tuple[int, int] = (0, 0),
) -> tuple[Tensor, dict[str, Tensor]]:
    """New weights, and the changed parts of the state.

    `w`, `g` [k, n] and `state` in the moments' dtype: "exp_avg" m and "exp_avg_sq" v [k, n] (`Recipe.moments`), and
    the techniques' buffers, [k, 1] or [k, n]. `down` [k, r, in]: the lora_down of each row of lora_up, before the step.
    `matrix`: rows and columns of each row, where the recipe reads them.
    """
    on = recipe.techniques
    m, v = state["exp_avg"], state.get("exp_avg_sq")
    step = Step(
        w, raw=g, grad=g, before=state, after={}, updates=rates.step, beta1=recipe.beta1, down=down, matrix=matrix
    )
    # 1  the gradient
    for technique in on:
        g = technique.gradient(g, step)
    step.grad = g
    # 2  the input of the momentum
    x = g
    for technique in on:
        x = technique.entering(x, step)
    # 3  first and second moment
    m = m.lerp(x, 1 - recipe.beta1)
    step.after["exp_avg"] = m
    if v is not None:
        v = step.after["exp_avg_sq"] = (v * recipe.beta2).addcmul(g, g, value=1 - recipe.beta2)
    # 4  the update, learning rate included: all later stages are proportional to it, and AdamW multiplies in this order
    for technique in on:
        m = technique.leaving(m, step)
    if recipe.normalized or v is None:
        u = rates.lr * m
    else:
        u = rates.step_size * m / (v.sqrt() / rates.root_correction + recipe.eps)
    # 5  its direction, against the gradient after 1
    for technique in on:
        u = technique.direction(u, step)
    # 6  its size
    for technique in on:
        u = technique.size(u, step)
    # 7  decoupled weight decay, with the plain rate, and the step itself
    w = w * rates.decay - u
    # 8  constraints on the weights
    for technique in on:
        w = technique.project(w, step)
    # 9  final corrections
    for technique in on:
        w = technique.settle(w, step)
    return w, step.after
