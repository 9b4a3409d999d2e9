"""The tier for every device: gathers the parameters of a stack into a matrix, updates all rows at once, scatters them.

Nothing is read back to the host. With a compiler the update, the 8-bit codec included, becomes a few kernels a stack.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from library.gpu import to_device

from . import codec, rounding
from .options import Rates, Recipe
from .stacks import Stack
from .update import update

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

CACHED = 2**15  # numbers: on a CPU, few rows are updated at a time, so that intermediate results stay in its cache
VARIANTS = 64  # compiled forms of the step: recipes, dtypes, 8 or 32 bits, and sizes of 1, which torch specialises
Maps = tuple[codec.Map, codec.Map]


class Fixed(TypedDict):
    """The arguments of `advance` beside its tensors' rows."""

    recipe: Recipe
    rates: Rates
    down: Tensor | None
    matrix: tuple[int, int]
    maps: Maps | None
    ordinals: Tensor | None


def advance(
    w: Tensor,
    g: Tensor,
    stored: Mapping[str, Tensor],
    *,
    recipe: Recipe,
    rates: Rates,
    down: Tensor | None,
    matrix: tuple[int, int],
    maps: Maps | None,
    ordinals: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """New weights [k, n] in their own dtype, and the new rows of the buffers that change."""
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    state = dict(stored)
    if maps is not None:
        for key, table in zip(recipe.moments, maps, strict=False):
            state[key] = codec.decode(state[key], state.pop(f"{key}_absmax"), table)
    state = {key: value.to(dtype) for key, value in state.items()}
    new, after = update(w.to(dtype), g.to(dtype), state, recipe=recipe, rates=rates, down=down, matrix=matrix)
    new = new.to(w.dtype) if ordinals is None else rounding.to_bfloat16(new, ordinals=ordinals, step=rates.step)
    if maps is not None:
        for key, table in zip(recipe.moments, maps, strict=False):
            after[key], after[f"{key}_absmax"] = codec.encode(after[key], table, floor=not table.signed)
    return new, after


class Batched:
    """Runs `advance`, compiled or not."""

    def __init__(self, *, compiled: bool) -> None:
        self._advance: Callable[..., tuple[Tensor, dict[str, Tensor]]] = advance
        self.compiled = compiled
        if compiled:
            # dynamic: one form serves all shapes; one for each shape would exceed torch's limit and then run uncompiled
            self._advance = torch.compile(advance, dynamic=True, fullgraph=True)

    def step(self, stack: Stack, rows: Sequence[int], grads: Sequence[Tensor], rates: Rates) -> None:
        """One step for these rows of a stack (a gradient for each), all at the same count of steps."""
        at_once = len(rows)
        if stack.layout.device.type == "cpu" and not self.compiled:
            at_once = max(1, CACHED // stack.layout.n)
        for start in range(0, len(rows), at_once):
            self._step(stack, rows[start : start + at_once], grads[start : start + at_once], rates)

    def _step(self, stack: Stack, rows: Sequence[int], grads: Sequence[Tensor], rates: Rates) -> None:
        members = [stack.members[row] for row in rows]
        weights = [member.parameter.detach() for member in members]
        stored = _select(stack.stored, rows)
        fixed: Fixed = {
            "recipe": stack.layout.recipe,
            "rates": self._arguments(rates, stack),
            "down": _downs(stack, rows) if stack.layout.recipe.reads_down else None,
            "matrix": stack.layout.matrix,
            "maps": _maps(stack) if stack.layout.eight_bit else None,
            "ordinals": _ordinals(stack, rows),
        }
        new, kept = self._call(_gather(weights), _gather(grads), stored, **fixed)
        torch._foreach_copy_(weights, [row.view_as(weight) for row, weight in zip(new, weights, strict=True)])
        _put(stack.stored, rows, kept)

    def _call(
        self, w: Tensor, g: Tensor, stored: Mapping[str, Tensor], **fixed: Unpack[Fixed]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.compiled:
            try:
                with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                    return self._advance(w, g, stored, **fixed)
            except Exception as error:  # a missing or broken compiler raises errors of many classes
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                logger.warning(
                    "CustomAdamW: the step cannot be compiled (%s); it runs uncompiled, which is slower", reason
                )
                self._advance, self.compiled = advance, False
        return self._advance(w, g, stored, **fixed)

    def _arguments(self, rates: Rates, stack: Stack) -> Rates:
        """For a compiled step the rates as tensors on the host: a float would be compiled in, anew at every step."""
        if not self.compiled:
            return rates
        return Rates(*(torch.tensor(value, dtype=stack.layout.moment_dtype) for value in rates))


@lru_cache
def tier(*, compiled: bool) -> Batched:
    """The tier, one per process: it is compiled once for all optimizers, and a failure is logged once."""
    return Batched(compiled=compiled)


def _downs(stack: Stack, rows: Sequence[int]) -> Tensor:
    """The partners [k, r, in] of a stack of lora_up weights, before this step."""
    downs = (stack.members[row].down for row in rows)
    return torch.stack([down.detach().flatten(1) for down in downs if down is not None]).to(stack.layout.moment_dtype)


def _gather(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.reshape(-1) for tensor in tensors])


def _contiguous_range(rows: Sequence[int]) -> slice | None:
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else None


def _select(stored: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """The given rows: views of the buffers if the rows are adjacent (usually all are), else copies."""
    return {key: _rows(buffer, rows) for key, buffer in stored.items()}


def _rows(buffer: Tensor, rows: Sequence[int]) -> Tensor:
    return buffer[_contiguous_range(rows) or _index(rows, buffer)]


def _put(stored: Mapping[str, Tensor], rows: Sequence[int], new: Mapping[str, Tensor]) -> None:
    span = _contiguous_range(rows)
    for key, values in new.items():
        stored[key][span or _index(rows, values)] = values


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    return to_device(torch.tensor(list(rows)), like.device)


def _maps(stack: Stack) -> Maps:
    device = stack.layout.device
    return codec.dynamic_map(signed=True, device=device), codec.dynamic_map(signed=False, device=device)


def _ordinals(stack: Stack, rows: Sequence[int]) -> Tensor | None:
    if not stack.layout.recipe.stochastic_rounding or stack.layout.dtype != torch.bfloat16:
        return None
    return _rows(stack.ordinals, rows)
