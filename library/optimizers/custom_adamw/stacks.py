"""The optimizer's state, laid out for speed: parameters of one size share buffers, one row each.

`optimizer.state[p]` holds views of those rows, so that a state dict looks like any optimizer's. Where a state came from
(a checkpoint, a copy, another device, 32 or 8 bits) is forgotten here: `build` moves whatever it finds into fresh
buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import codec
from .options import Recipe
from .paged import zeros

State = dict[str, Any]


class Stored(NamedTuple):
    """Buffers whose names are the keys in `optimizer.state[p]`; k rows each. None: not kept for this recipe."""

    exp_avg: Tensor  # [k, n] in the moments' type, or uint8 codes
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor | None  # [k, blocks] with 8 bits
    exp_avg_sq_absmax: Tensor | None
    adopt_k: Tensor | None  # [k, 1]
    tam_s: Tensor | None  # [k, 1]
    spd_anchor: Tensor | None  # [k, n] in the parameters' type


class Member(NamedTuple):
    """A parameter with what is known about it before its first step."""

    parameter: Tensor
    state: State
    ordinal: int  # its place among all parameters, the same in every run
    down: Tensor | None  # lora_up's partner


class Layout(NamedTuple):
    """What the rows of a stack have in common."""

    group: int
    recipe: Recipe
    n: int  # numbers in each parameter
    rank: int  # columns of a lora_up that ALoRA scales, else 0
    down_size: int  # numbers in its partner, else 0
    dtype: torch.dtype
    device: torch.device
    eight_bit: bool
    native: bool

    @property
    def moment_dtype(self) -> torch.dtype:
        """float32 whatever the weights: in bfloat16 beta2 * v is v. float64 weights keep float64 moments."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass(eq=False)
class Stack:
    """Parameters of one layout as rows."""

    layout: Layout
    members: list[Member]
    stored: Stored

    @property
    def bytes(self) -> int:
        """Of state, per-tensor scalars included."""
        return sum(buffer.nbytes for buffer in self.stored if buffer is not None)

    @cached_property
    def ordinals(self) -> Tensor:
        """Of the members, int64 [k, 1] on their device."""
        return torch.tensor([[member.ordinal] for member in self.members], device=self.layout.device)


def build(layout: Layout, members: Sequence[Member], *, paged: bool) -> Stack:
    """Buffers for these members, filled from their present states, which become views of them."""
    stored = _allocate(layout, len(members), paged=paged)
    for row, member in enumerate(members):
        views = _views(member, stored, row)
        _fill(member, views)
        member.state.update(views)
        member.state.setdefault("step", 0)
    return Stack(layout, list(members), stored)


def _allocate(layout: Layout, k: int, *, paged: bool) -> Stored:
    n, recipe, dtype = layout.n, layout.recipe, layout.moment_dtype

    def room(width: int, dtype: torch.dtype, wanted: bool = True) -> Any:
        return zeros((k, width), dtype=dtype, device=layout.device, paged=paged) if wanted else None

    moment = torch.uint8 if layout.eight_bit else dtype
    return Stored(
        exp_avg=room(n, moment),
        exp_avg_sq=room(n, moment),
        exp_avg_absmax=room(codec.blocks(n), torch.float32, layout.eight_bit),
        exp_avg_sq_absmax=room(codec.blocks(n), torch.float32, layout.eight_bit),
        adopt_k=room(1, dtype, recipe.adopt),
        tam_s=room(1, dtype, recipe.tam),
        spd_anchor=room(n, layout.dtype, recipe.spd and recipe.spd_anchor == "initial"),
    )


def _views(member: Member, stored: Stored, row: int) -> State:
    shaped = {"exp_avg", "exp_avg_sq", "spd_anchor"}
    scalar = {"adopt_k", "tam_s"}
    return {
        key: buffer[row].view(member.parameter.shape if key in shaped else () if key in scalar else (-1,))
        for key, buffer in stored._asdict().items()
        if buffer is not None
    }


def _fill(member: Member, views: State) -> None:
    """Copy what a member's state holds into its new rows; what it lacks starts as at the first step."""
    state = member.state
    known = "exp_avg" in state
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        peaks = f"{key}_absmax"
        if known:
            _convert(state[key], state.get(peaks), views[key], views.get(peaks), signed=signed)
        if peaks not in views:
            state.pop(peaks, None)
    for key in ("adopt_k", "tam_s"):
        if key in views and key in state:
            views[key].copy_(state[key])
    if "adopt_k" in views and "adopt_k" not in state and known:
        views["adopt_k"].fill_(state["step"])  # moments of an AdamW without ADOPT: v has been seeded long ago
    if "spd_anchor" in views:
        views["spd_anchor"].copy_(state.get("spd_anchor", member.parameter.detach()))


def _convert(old: Tensor, old_peaks: Tensor | None, new: Tensor, new_peaks: Tensor | None, *, signed: bool) -> None:
    """Copy a moment, between 32 and 8 bits if need be."""
    if (old_peaks is None) == (new_peaks is None):
        new.copy_(old)
        if new_peaks is not None and old_peaks is not None:
            new_peaks.copy_(old_peaks)
        return
    table = codec.dynamic_map(signed=signed, device=new.device)
    flat = old.to(new.device).reshape(1, -1)
    if new_peaks is None:
        assert old_peaks is not None
        new.copy_(codec.decode(flat, old_peaks.to(new.device).reshape(1, -1), table).view(new.shape))
    else:
        codes, peaks = codec.encode(flat.float(), table, floor=not signed)
        new.copy_(codes.view(new.shape))
        new_peaks.copy_(peaks.view(-1))
