"""What a weight decay follows beside the steps: the gradient norm (`--wd_speed`) and the rate (`--wd_lr_coupling`).

Speed. Before the fall the running mean of the gradient norm is the usual norm. In the fall the curve goes on, in each
step, by usual norm / running mean steps instead of one: faster while the gradients are smaller than they were, slower
while they are larger, so that regularisation stays where training is restless. The bounds are a half and two.

Coupling. A decoupled weight decay shrinks the weights by rate × weight decay in each step, so with a falling rate it
falls twice. With "lower" it falls once: by the lower of the curve c and the rate r, each as a share of its first value,
in place of their product. The factor of the weight decay is min(c, r) / r, which is never above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from library.optimizers.groups import Group
from library.optimizers.weight_decay import Curve

KEEP = 0.98  # of the running mean in each step: it is one of about 50 steps
SLOWEST, FASTEST = 0.5, 2.0  # steps of the curve in one step


@dataclass(frozen=True)
class Pace:
    """Its state is in the groups, and so in the optimizer's state dict: "wd_norm", "wd_usual_norm" and "wd_ahead", by
    how many steps the curve is ahead."""

    by_gradient: bool = False
    with_rate: bool = False

    def __bool__(self) -> bool:
        return self.by_gradient or self.with_rate

    def observe(self, groups: Sequence[Group], curve: Curve, gradient_norm: float, *, counter: str) -> None:
        """Take the gradient norm of a step, before it. group["<counter>"]: the steps that have been done."""
        for group in groups:
            before = group.get("wd_norm")
            norm = gradient_norm if before is None else KEEP * before + (1 - KEEP) * gradient_norm
            group["wd_norm"] = norm
            start = curve.transition_steps if curve.schedule != "adaptive" else group.get("wd_flat_since")
            if start is None or group.get(counter, 0) < start:
                group["wd_usual_norm"] = norm
                continue
            usual = group.setdefault("wd_usual_norm", norm)
            speed = min(max(usual / norm, SLOWEST), FASTEST) if norm > 0 else FASTEST
            group["wd_ahead"] = group.get("wd_ahead", 0.0) + speed - 1

    def factor(self, group: Group, curve: Curve, step: int) -> float:
        """The factor of the configured weight decay of a group at `step`, counted from 1."""
        factor = curve.factor(step + group.get("wd_ahead", 0), flat_since=group.get("wd_flat_since"))
        first = group.get("initial_lr", group["lr"])
        if not self.with_rate or first == 0:
            return factor
        rate = group["lr"] / first
        return min(factor / rate, 1.0) if rate > 0 else 1.0


STEADY = Pace()
