"""The methods by which the differences of several files become one, by name. Imports no torch.

A method is a module with `combine(deltas, weights, settings)`: from the differences of the files to one layer, all of
one shape, fp32, zeros for a file without this layer, and a weight for each, to the difference of the result.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MethodName = Literal["linear", "svd", "slerp", "ties", "dare", "dare_ties"]
METHODS: dict[MethodName, str] = {
    "linear": "the weighted sum (task arithmetic; negative weights take away)",
    "svd": "the weighted sum, cut to --rank",
    "slerp": "two files on the arc between their directions, with the length between theirs",
    "ties": "the largest weights of each file, where the files agree in sign",
    "dare": "a random part of each file's weights, scaled up for those dropped",
    "dare_ties": "the same, where the files agree in sign",
}
"""Each has the file of its name in this folder; svd is linear's."""
_DENSITY = {"ties": 0.2, "dare": None, "dare_ties": None}  # None: there is no usual value
_SEEDED = ("dare", "dare_ties")


@dataclass(frozen=True)
class Method:
    """name: a key of METHODS. density: the share of the weights that is kept, in (0, 1]. seed: of what is dropped."""

    name: str = "linear"
    density: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, name: str | None, density: float | None, seed: int | None, *, files: int) -> Method:
        """From the options. `UserError` for one that is missing, wrong, or without effect."""
        name = name or "linear"
        if density is not None and name not in _DENSITY:
            raise UserError(f"--density has no effect with --method {name}")
        if seed is not None and name not in _SEEDED:
            raise UserError(f"--seed has no effect with --method {name}")
        density = _DENSITY.get(name, 1.0) if density is None else density
        if density is None:
            raise UserError(f"--method {name}: needs --density, the share of the weights that is kept")
        if not 0 < density <= 1:
            raise UserError(f"--density {density:g}: has to be above 0 and at most 1")
        if name == "slerp" and files != 2:
            raise UserError(f"--method slerp: takes two files, not {files}")
        return cls(name, density, seed or 0)

    @property
    def is_linear(self) -> bool:
        """Whether the result is the weighted sum, so that factors can stand beside each other."""
        return self.name in ("linear", "svd")

    @property
    def usual_weight(self) -> float:
        """Of a file for which none is given."""
        return 0.5 if self.name == "slerp" else 1.0

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], *, layer: str) -> Tensor:
        """The difference of the result to one layer, whose name is part of the key of random draws."""
        module = importlib.import_module(f"{__name__}.{'linear' if self.is_linear else self.name}")
        combine: Callable[..., Any] = module.combine
        found: Tensor = combine(deltas, weights, Settings(self.density, self.seed, layer))
        return found

    def __str__(self) -> str:
        """For the metadata of the result."""
        density = f", density {self.density:g}" if self.name in _DENSITY else ""
        return f"{self.name}{density}{f', seed {self.seed}' if self.name in _SEEDED else ''}"


@dataclass(frozen=True)
class Settings:
    """See `Method`; layer: the name of the one that is merged."""

    density: float
    seed: int
    layer: str
