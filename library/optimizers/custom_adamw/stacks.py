"""The optimizer's state, laid out for speed: parameters of one size share buffers, one row each.

`optimizer.state[p]` has views of those rows, so that a state dict looks like any optimizer's. The origin of a state (a
checkpoint, a copy, another device, 32 or 8 bits) does not matter: `build` copies it into new buffers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..groups import State
from . import codec
from .options import MOMENTS, Recipe
from .paged import zeros
from .technique import Buffer


class Member(NamedTuple):
    """A parameter with the facts about it before its first step."""

    parameter: Tensor
    state: State
    ordinal: int  # its place among all parameters, the same in every run
    down: Tensor | None  # lora_up's partner


class Layout(NamedTuple):
    """The common properties of a stack's rows."""

    group: int
    recipe: Recipe
    n: int  # numbers in each parameter
    rank: int  # columns of a lora_up whose step reads its partner, else 0
    down_size: int  # numbers in its partner, else 0
    matrix: tuple[int, int]  # rows and columns of each parameter, if the step reads them, else (0, 0)
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
    """Parameters of one layout as rows of buffers, whose names are the keys in `optimizer.state[p]`: the moments
    (`Recipe.moments`) [k, n], with 8 bits as codes with maxima [k, blocks], and the techniques' own [k, n] or [k, 1].
    """

    layout: Layout
    members: list[Member]
    stored: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of state, including per-tensor scalars."""
        return sum(buffer.nbytes for buffer in self.stored.values())

    @cached_property
    def ordinals(self) -> Tensor:
        """The members' ordinals, int64 [k, 1] on their device."""
        return torch.tensor([[member.ordinal] for member in self.members], device=self.layout.device)


def matrix_of(parameter: Tensor) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix: a convolution's kernel (out, in, height, width) has `out` rows."""
    rows = parameter.shape[0]
    return rows, parameter.numel() // rows


def build(layout: Layout, members: Sequence[Member], *, paged: bool) -> Stack:
    """Buffers for these members, filled from their present states, which become views of them."""
    own = [buffer for technique in layout.recipe.techniques for buffer in technique.buffers()]
    stored = _allocate(layout, own, len(members), paged=paged)
    scalar = {buffer.name for buffer in own if buffer.per == "tensor"}
    for row, member in enumerate(members):
        views = {key: _view(buffer[row], member, key, scalar) for key, buffer in stored.items()}
        _fill(member, views, own)
        member.state.update(views)
        member.state.setdefault("step", 0)
    return Stack(layout, list(members), stored)


def restart_incomplete(recipe: Recipe, state: State) -> bool:
    """Start anew where a state lacks a moment that a step needs: neither its other moment nor its count of steps would
    suit one of zeros. Returns whether it did."""
    if all(key in state for key in recipe.moments) or not ("exp_avg" in state or state.get("step")):
        return False
    own = (buffer.name for technique in recipe.techniques for buffer in technique.buffers() if buffer.per == "tensor")
    for key in ("exp_avg", "exp_avg_absmax", *own):
        state.pop(key, None)
    state["step"] = 0
    return True


def _allocate(layout: Layout, own: Sequence[Buffer], k: int, *, paged: bool) -> dict[str, Tensor]:
    n, dtype = layout.n, layout.moment_dtype
    moments = layout.recipe.moments
    rows = dict.fromkeys(moments, (n, torch.uint8 if layout.eight_bit else dtype))
    if layout.eight_bit:
        rows |= {f"{key}_absmax": (codec.blocks(n), torch.float32) for key in moments}
    for buffer in own:
        rows[buffer.name] = (n if buffer.per == "number" else 1, layout.dtype if buffer.as_weights else dtype)
    return {
        key: zeros((k, width), dtype=kind, device=layout.device, paged=paged) for key, (width, kind) in rows.items()
    }


def _view(row: Tensor, member: Member, key: str, scalar: Collection[str]) -> Tensor:
    """A row in its parameter's shape or as a scalar; the maxima stay a row."""
    if key.endswith("_absmax"):
        return row
    return row.view(()) if key in scalar else row.view(member.parameter.shape)


def _fill(member: Member, views: State, own: Sequence[Buffer]) -> None:
    """Copy a member's state into its new rows; missing values start as at the first step."""
    state = member.state
    for key, signed in zip(MOMENTS, (True, False), strict=True):
        peaks = f"{key}_absmax"
        if key in state and key not in views:
            del state[key]  # of an optimizer that kept it
        elif key in state:
            _convert(state[key], state.get(peaks), views[key], views.get(peaks), signed=signed)
        if peaks not in views:
            state.pop(peaks, None)
    for buffer in own:
        if buffer.name in state:
            views[buffer.name].copy_(state[buffer.name])
        elif buffer.start is not None:
            views[buffer.name].copy_(torch.as_tensor(buffer.start(member.parameter, state)))


def _convert(old: Tensor, old_peaks: Tensor | None, new: Tensor, new_peaks: Tensor | None, *, signed: bool) -> None:
    """Copy a moment, converting between 32 and 8 bits if necessary."""
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
