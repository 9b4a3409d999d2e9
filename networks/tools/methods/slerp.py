"""Spherical interpolation of two differences (Shoemake 1985), layer by layer.

With t = w₂ / (w₁ + w₂) and θ the angle between the differences as vectors, the direction of the result is
[sin((1 - t)θ) â + sin(tθ) b̂] / sin θ, of unit length, and its length (1 - t)|a| + t|b|; all times w₁ + w₂, which is 1
for weights that are shares. The average of two differences that point apart is shorter than either; this is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from library.errors import UserError
from networks.tools.methods import Settings

_STRAIGHT = 1e-4  # sin θ below which the arc is a line, or, of opposite directions, is not defined


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """Of two differences. `UserError` for a negative weight. Where one is 0, or both are parallel: the weighted sum."""
    if min(weights) < 0:
        raise UserError(f"--method slerp: the weights are shares of two files; {min(weights):g} is negative")
    (first, second), whole = deltas, sum(weights)
    lengths = [float(delta.double().norm()) for delta in deltas]
    cosine = 1.0
    if min(lengths) > 0:
        cosine = float((first.double() * second.double()).sum()) / (lengths[0] * lengths[1])
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if whole == 0 or math.sin(angle) < _STRAIGHT:
        return first * weights[0] + second * weights[1]
    share = weights[1] / whole
    length = whole * ((1 - share) * lengths[0] + share * lengths[1]) / math.sin(angle)
    along = [math.sin((1 - share) * angle) / lengths[0], math.sin(share * angle) / lengths[1]]
    return first * (length * along[0]) + second * (length * along[1])
