"""Forgetting: how far the loss on images that a LoRA is not about is above the base model's, with the same noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

WARNED, SEVERE = 0.10, 0.30  # of the base's loss

ByTimestep = Mapping[int, float]


@dataclass(frozen=True)
class Forgetting:
    """The mean losses on one folder by timestep: with the network after `step` steps, and of the base."""

    step: int
    losses: ByTimestep
    base: ByTimestep

    @property
    def loss(self) -> float:
        return mean(self.losses)

    @property
    def rate(self) -> float:
        """(loss - base) / base; negative where the network is better than the base."""
        return rate(self.loss, mean(self.base))

    def at(self, timestep: int) -> float:
        """The same in one range of noise."""
        return rate(self.losses[timestep], self.base[timestep])

    @property
    def level(self) -> int:
        """0: fine, 1: above `WARNED`, 2: above `SEVERE`, or not a number."""
        return 2 if math.isnan(self.rate) else (self.rate > WARNED) + (self.rate > SEVERE)

    def line(self) -> dict[str, float]:
        """Its numbers by their names in the metrics. Rates are shares of the base's loss."""
        values = {"loss": self.loss, "base": mean(self.base), "rate": self.rate}
        return values | {f"t{timestep}": self.at(timestep) for timestep in self.losses}

    def in_words(self) -> str:
        """ "+12.1 % (+3.0 % at t 100, … +20.5 % at t 900)"."""
        parts = ", ".join(f"{100 * self.at(timestep):+.1f} % at t {timestep}" for timestep in self.losses)
        return f"{100 * self.rate:+.1f} % ({parts})"


def rate(loss: float, base: float) -> float:
    return (loss - base) / base


def mean(losses: ByTimestep) -> float:
    return math.fsum(losses.values()) / len(losses)


def advice(level: int) -> str:
    """The remedy for this level of `Forgetting`: 1 or 2."""
    remedy = (
        'train images of that kind as preserved ones (prior = "base"), fewer steps, at a lower rate, or with a lower '
        "--network_dim; docs/forgetting.md compares the ways"
    )
    if level > 1:
        return f"the network has lost much of what the base model can do there. Use an earlier file, and {remedy}"
    return f"the network begins to lose what the base model can do there. If that matters, {remedy}"
