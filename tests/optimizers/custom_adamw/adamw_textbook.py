"""CustomAdamW a second time, as a reader of the papers would write it down: one tensor, float64, plain numbers.

Shares no code with the library, so that a slip in one of them shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OPTIONS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "use_spd": True,
    "spd_lambda": 0.06,
    "use_cautious": True,
    "cautious_min": 1e-3,
    "use_orthogonal_grad": False,
    "orthograd_target": "down",
    "use_adopt_stability": True,
    "adopt_eps": 1e-6,
    "adopt_clip": 0.25,
    "use_grams": False,
    "use_agr": True,
    "use_tam": True,
    "tam_beta": 0.9,
    "use_alora": True,
    "alora_ratio": 2.0,
    "alora_eta": 2.0,
    "dynamic_weight_decay": True,
    "wd_transition_steps": 1000,
    "wd_decay_factor": 0.7,
    "wd_min_ratio": 0.1,
    "wd_max_progress": 2.0,
}


@dataclass
class Textbook:
    """The state of one tensor."""

    options: dict[str, Any]
    role: str = ""  # "down", "up" of a pair, or neither
    scale: float = 1.0  # alpha / rank
    m: Any = 0.0
    v: Any = 0.0
    s: float = 0.0
    step: int = 0
    k: int = field(default=0)

    def move(self, w: Tensor, g: Tensor, down: Tensor | None = None) -> Tensor:
        """The weights after one step; `down` is lora_up's partner before it."""
        o = {**OPTIONS, **self.options}
        beta1, beta2 = o["betas"]
        self.step += 1
        raw, w0 = g, w
        if o["use_agr"] and g.numel() > 1:
            g = g * (1 - g.abs() / g.abs().sum()) if g.abs().sum() > 0 else g
        if o["use_orthogonal_grad"] and (o["orthograd_target"] in ("all", self.role)):
            size = g.norm()
            g = g - (w * g).sum() / ((w * w).sum() + 1e-30) * w
            g = g * size / (g.norm() + 1e-30) if g.norm() > 4 * 2**-52 * size else torch.zeros_like(g)
        x = g
        if o["use_adopt_stability"]:
            if self.k == 0:
                if (g == 0).all():
                    return w
                self.k, self.v = 1, g**2
                return w
            bound = self.k ** o["adopt_clip"]
            x = (g / self.v.sqrt().clamp(min=o["adopt_eps"])).clamp(-bound, bound)
        if o["use_tam"]:
            m = torch.zeros_like(g) + self.m
            sizes = float(m.norm() * x.norm())
            self.s = o["tam_beta"] * self.s + (1 - o["tam_beta"]) * (float((m * x).sum()) / sizes if sizes else 0.0)
            x = (1e-8 + (1 + self.s) / 2) * x
        self.m = beta1 * self.m + (1 - beta1) * x
        if o["use_adopt_stability"]:
            u = self.m
            self.k += 1
        self.v = beta2 * self.v + (1 - beta2) * g**2
        if not o["use_adopt_stability"]:
            u = self.m / (1 - beta1**self.step) / ((self.v / (1 - beta2**self.step)).sqrt() + o["eps"])
        if o["use_grams"]:
            u = g.sign() * u.abs()
        elif o["use_cautious"]:
            mask = (u * g > 0).double()
            u = u * mask / max(float(mask.mean()), o["cautious_min"])
        if o["use_alora"] and self.role == "up" and down is not None:
            product = w.flatten(1) @ down.flatten(1)
            rows = o["alora_ratio"] / (1 + o["alora_eta"] ** 2 * self.scale * product.norm(dim=1)).sqrt()
            u = rows.view(-1, *[1] * (w.ndim - 1)) * u
        w = w * (1 - o["lr"] * self.decay(o)) - o["lr"] * u
        if o["use_spd"] and -(raw * w0).sum() < 0:
            outward = (w.norm() - w0.norm()) / w.norm()
            w = w - o["spd_lambda"] * outward.clamp(0, 1) * w
        return w

    def decay(self, o: dict[str, Any]) -> float:
        transition = o["wd_transition_steps"]
        if not o["dynamic_weight_decay"] or self.step <= transition:
            return o["weight_decay"]
        progress = min((self.step - transition) / transition, o["wd_max_progress"])
        return o["weight_decay"] * max(o["wd_min_ratio"], math.pow(o["wd_decay_factor"], progress))
