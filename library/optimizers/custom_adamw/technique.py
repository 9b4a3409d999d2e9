"""The declaration of a technique of CustomAdamW: its settings, its state, and its work at the stages of a step.

A technique is one file with one class, and a line in `techniques.py`. The class is a frozen dataclass:

- its fields, made by `setting`, are its options; the first one switches it on. From them follow the constructor's
  signature, the flags and their help, defaults and checks of parameter groups, the table in docs/optimizer.md and the
  structure of the CPU kernel;
- `buffers` is its state, which is stored, saved, loaded and resumed without further code;
- of the stages (`gradient` ... `settle`, `decay_factor`) it overrides those at which it acts. update.py has their
  order;
- the first line of its docstring is its line in the docs.

An instance is the technique with the settings of one parameter group. If there is a file `kernel/<module>.h`, the CPU
kernel supports the technique; without one, parameters that it applies to use the batched step. The modules of
techniques are read by `--help`, so they import torch only inside functions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_type_hints

from ..groups import Options, State
from .pairs import Role
from .setting import Setting

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self


class About(NamedTuple):
    """The facts about a parameter before its first step."""

    role: Role  # which half of a LoRA pair, by its name
    paired: bool  # whether it is a lora_up whose lora_down is there
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Buffer(NamedTuple):
    """State of a technique, under the key `name` in `optimizer.state[p]`.

    Kept in float32 (float64 for such weights), or in the weights' own type. `start` is its value at the first step:
    of (parameter, state), where `state` may come from another optimizer, with "step", "exp_avg" and "exp_avg_sq";
    None means 0.
    """

    name: str
    per: Literal["tensor", "number"] = "tensor"  # one number for a parameter, or as many as it has
    as_weights: bool = False
    start: Callable[[Tensor, State], Tensor | float] | None = None


@dataclass
class Step:
    """The inputs of a technique in a step of some parameters. Tensors are [k, n]: a row is a parameter.

    `before` holds the state before the step: "exp_avg", "exp_avg_sq" (unless a technique does without it) [k, n] and
    the buffers ([k, 1] or [k, n]); `after` takes what changes. `updates` counts the updates of the momentum, this one
    included; `beta1` is its rate.
    """

    weight: Tensor  # before the step
    raw: Tensor  # the gradient as it came
    grad: Tensor  # the gradient after the stage `gradient`
    before: Mapping[str, Tensor]
    after: dict[str, Tensor]
    updates: Tensor | float
    beta1: float
    down: Tensor | None  # lora_down [k, r, in] of lora_up weights [k, out * r], for techniques that read it
    matrix: tuple[int, int]  # rows and columns of each parameter (n = rows * columns), for techniques that read it


class Technique:
    """Base of all techniques: acts at no stage."""

    name: ClassVar[str]
    papers: ClassVar[tuple[str, ...]] = ()  # arXiv numbers
    excludes: ClassVar[Mapping[str, str]] = {}  # switches of techniques that it overrides, with the reason
    normalizes: ClassVar[bool] = False  # gives the update its size itself, so that Adam's division is left out
    one_moment: ClassVar[bool] = False  # needs no second moment, so that none is kept
    reads_matrix: ClassVar[bool] = False  # needs the rows and columns of a parameter
    reads_down: ClassVar[bool] = False  # needs lora_up's partner as it was before the step

    # The stages of a step, in order

    def gradient(self, g: Tensor, step: Step) -> Tensor:
        """The gradient for all later stages."""
        return g

    def entering(self, x: Tensor, step: Step) -> Tensor:
        """The input of the momentum: at first the gradient."""
        return x

    def leaving(self, m: Tensor, step: Step) -> Tensor:
        """What the momentum passes to the update: at first the momentum."""
        return m

    def direction(self, u: Tensor, step: Step) -> Tensor:
        """The update, learning rate included, with another direction or masked."""
        return u

    def size(self, u: Tensor, step: Step) -> Tensor:
        """The update with another length."""
        return u

    def project(self, w: Tensor, step: Step) -> Tensor:
        """The new weights, after weight decay and update."""
        return w

    def settle(self, w: Tensor, step: Step) -> Tensor:
        """The final weights; may also change `step.after`."""
        return w

    def decay_factor(self, step: int) -> float:
        """The factor of the weight decay at a step of the group, counted from 1."""
        return 1.0

    # Its state, its parameters, its messages

    def buffers(self) -> tuple[Buffer, ...]:
        """Its state."""
        return ()

    def applies(self, about: About) -> bool:
        """Whether it acts on this parameter."""
        return about.paired or not self.reads_down

    def known_to_kernel(self) -> bool:
        """Whether the CPU kernel, if it has a header for the technique, supports it with these settings."""
        return True

    def check(self) -> None:
        """Raise `UserError` for settings that do not fit together, or that the declared bounds cannot check."""

    def unmet(self, hint: str) -> str:
        """A warning if it applies to no parameter; "" for none. `hint`: a possible reason why names were not found."""
        return ""

    def remark(self) -> str:
        """Its settings in words, for the start-up message; "" for none."""
        return ""

    # Derived from the declaration

    @classmethod
    @lru_cache
    def settings(cls) -> tuple[Setting, ...]:
        """Its options; the first one is its switch."""
        assert "__dataclass_params__" in vars(cls), f"{cls.__qualname__} needs @dataclass(frozen=True)"
        hints = get_type_hints(cls)
        return tuple(
            Setting(field.name, hints[field.name], field.default, **field.metadata["setting"])
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        )

    @classmethod
    def switch(cls) -> Setting:
        """The option that turns it on."""
        return cls.settings()[0]

    @classmethod
    def of(cls, group: Options) -> Self:
        """The technique with the settings of a parameter group."""
        return cls(**{item.name: group[item.name] for item in cls.settings()})

    @classmethod
    def acts_at(cls, *stages: str) -> bool:
        """Whether it overrides one of these stages."""
        return any(getattr(cls, stage) is not getattr(Technique, stage) for stage in stages)

    @classmethod
    @lru_cache
    def has_kernel(cls) -> bool:
        """Whether there is a header for it in the CPU kernel."""
        package, _, name = cls.__module__.rpartition(".")
        return (
            package == f"{__package__}.techniques"
            and Path(__file__).with_name("kernel").joinpath(f"{name}.h").is_file()
        )


STAGES = (
    "gradient",
    "entering",
    "leaving",
    "direction",
    "size",
    "project",
    "settle",
)  # the stages that work on tensors


def norm(x: Tensor) -> Tensor:
    """||x|| [k, 1] for rows [k, n]."""
    import torch

    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
