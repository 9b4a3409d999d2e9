"""The tier for the CPU: the kernel in kernel/, called with addresses.

Without a compiler, or if it fails, the caller uses another tier. The kernel is plain C++17 behind a C interface, so
that it depends on no version of torch and compiles in two seconds.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import codec
from .build import Unavailable as Unavailable
from .build import shared_library
from .options import Rates, Recipe
from .setting import Setting
from .stacks import Stack, matrix_of
from .technique import Technique
from .techniques import techniques

SOURCES = Path(__file__).with_name("kernel")
LARGEST = 2**22  # numbers in a tensor: one thread updates all of it, with scratch arrays of its size
LARGEST_SIDE = 128  # rows or columns of a matrix whose short side is worked with in double, by one thread
SMALLEST_SHARE = 2**15  # numbers that are worth starting a thread for
SCRATCH_ARRAYS, LANES = 6, 16  # as in kernel/, whose LANES may be fewer
_KNOWN = [kind for kind in techniques() if kind.has_kernel()]
_SETTINGS = [item for kind in _KNOWN for item in kind.settings()]


def _is_whole(item: Setting) -> bool:
    """Whether the kernel has the setting as an integer: a switch, or the index of a choice. All others are doubles."""
    return item.hint is bool or bool(item.choices)


# Structures that the techniques declare. kernel/ includes them from a header that is written when it is compiled


class _Recipe(ctypes.Structure):
    """Settings of techniques that are off are 0. Ordered by type, so that there is no padding."""

    _fields_ = [
        ("stochastic_rounding", ctypes.c_int32),
        *((item.name, ctypes.c_int32) for item in _SETTINGS if _is_whole(item)),
        *((name, ctypes.c_float) for name in ("one_minus_beta1", "beta2", "one_minus_beta2", "eps")),
        *((item.name, ctypes.c_double) for item in _SETTINGS if not _is_whole(item)),
    ]


class _State(ctypes.Structure):
    """Addresses of the buffers that techniques have with their usual settings; null for a technique that is off."""

    _fields_ = [(buffer.name, ctypes.c_void_p) for kind in _KNOWN for buffer in kind().buffers()]


def declarations() -> dict[str, str]:
    """The header that the kernel includes, by its name."""
    types = {ctypes.c_float: "float", ctypes.c_double: "double", ctypes.c_int32: "int32_t", ctypes.c_void_p: "float*"}
    lines = ["#pragma once", "#include <cstdint>"]
    for name, structure in (("Recipe", _Recipe), ("State", _State)):
        fields = (f"  {types[field[1]]} {field[0]};" for field in structure._fields_)
        lines += [f"struct {name} {{", *fields, "};"]
    return {"declared.h": "\n".join(lines) + "\n"}


# The structures of kernel/common.h, field by field


class _Rates(ctypes.Structure):
    _fields_ = [
        ("step", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("lr", "decay", "step_size", "root_correction")),
    ]


class _Tensor(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "m", "v", "m_peak", "v_peak", "down")),
        ("state", _State),
        *((name, ctypes.c_int64) for name in ("n", "rank", "down_columns", "rows")),
        *((name, ctypes.c_int32) for name in ("bfloat16", "eight_bit", "recipe")),
        ("ordinal", ctypes.c_uint32),
    ]


class _Codec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "thresholds")]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tensors", "tasks", "recipes", "rates", "grads", "rates_of", "scratch")),
        ("signed_map", _Codec),
        ("unsigned_map", _Codec),
        ("capacity", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("n_tasks", "threads")),
    ]


def library() -> ctypes.CDLL:
    """The kernel. Raises `Unavailable`."""
    loaded = _load()
    if isinstance(loaded, Unavailable):
        raise loaded
    return loaded


@lru_cache
def _load() -> ctypes.CDLL | Unavailable:
    try:
        loaded = shared_library(SOURCES / "step.cpp", declarations())
    except Unavailable as reason:
        return reason
    sizes = (ctypes.c_int64 * 5)()
    loaded.custom_adamw_sizes(sizes)
    structures = [ctypes.sizeof(part) for part in (_Recipe, _Rates, _Tensor, _Call)]
    assert list(sizes) == [*structures, SCRATCH_ARRAYS], "kernel/common.h and native.py differ"
    loaded.custom_adamw_step.restype = None
    return loaded


def suits(parameter: Tensor, recipe: Recipe) -> bool:
    """Whether the kernel supports a step of this parameter; it supports what LoRA on a CPU needs."""
    return (
        parameter.device.type == "cpu"
        and parameter.dtype in (torch.float32, torch.bfloat16)
        and parameter.is_contiguous()
        and 0 < parameter.numel() <= LARGEST
        and all(map(knows, recipe.techniques))
        and not (recipe.reads_matrix and min(matrix_of(parameter)) > LARGEST_SIDE)
    )


def knows(technique: Technique) -> bool:
    """Whether the kernel supports this technique, with its settings."""
    return technique.has_kernel() and technique.known_to_kernel()


class Native:
    """The kernel's view of some stacks: addresses of everything that stays in place between steps."""

    def __init__(self, stacks: Mapping[int, Stack]) -> None:
        """`stacks` by their number in the plan."""
        self._library = library()
        self._members = [
            (number, row, member) for number, stack in stacks.items() for row, member in enumerate(stack.members)
        ]
        self._at = {
            (number, row): (index, member.parameter.dtype) for index, (number, row, member) in enumerate(self._members)
        }
        recipes = {number: place for place, number in enumerate(stacks)}
        self._recipes = (_Recipe * len(stacks))(*(_flatten(stack.layout.recipe) for stack in stacks.values()))
        self._tensors = (_Tensor * len(self._members))(
            *(_describe(stacks[number], row, recipes[number]) for number, row, _ in self._members)
        )
        tasks = self._pair_up()
        self._tasks = (ctypes.c_int32 * (2 * len(tasks)))(*(index for task in tasks for index in task))
        numbers = sum(tensor.n for tensor in self._tensors)
        self._threads = max(1, min(torch.get_num_threads(), len(tasks), numbers // SMALLEST_SHARE))
        capacity = -(-max(_room(stack) for stack in stacks.values()) // LANES) * LANES
        self._scratch = torch.empty(self._threads * SCRATCH_ARRAYS * capacity)
        self._call = _Call(
            tensors=ctypes.addressof(self._tensors),
            tasks=ctypes.addressof(self._tasks),
            recipes=ctypes.addressof(self._recipes),
            scratch=self._scratch.data_ptr(),
            signed_map=_codec(signed=True),
            unsigned_map=_codec(signed=False),
            capacity=capacity,
            n_tasks=len(tasks),
            threads=self._threads,
        )

    def _pair_up(self) -> list[tuple[int, int]]:
        """lora_up first, since its row factors need lora_down before its step; largest tasks first, so that none is
        left to a single thread at the end."""
        index_of = {id(member.parameter): index for index, (_, _, member) in enumerate(self._members)}
        partners = {
            index: index_of[id(member.down)]
            for index, (_, _, member) in enumerate(self._members)
            if member.down is not None and id(member.down) in index_of
        }
        downs = set(partners.values())
        tasks = [(index, partners.get(index, -1)) for index in range(len(self._tensors)) if index not in downs]
        size = [tensor.n for tensor in self._tensors] + [0]
        return sorted(tasks, key=lambda task: -(size[task[0]] + size[task[1]]))

    def step(self, items: Iterable[tuple[int, int, Tensor, Rates]]) -> None:
        """One step of (stack, row, gradient, rates) for everything that has a gradient."""
        rates_table: dict[Rates, int] = {}
        grads, rates_of = [0] * len(self._members), [0] * len(self._members)
        changed, kept = [], []
        for stack, row, grad, rates in items:
            index, dtype = self._at[stack, row]
            if grad.dtype is not dtype or not grad.is_contiguous():
                grad = grad.to(dtype).contiguous()
                kept.append(grad)  # until the kernel is done
            grads[index] = grad.data_ptr()
            changed.append(self._members[index][2].parameter)
            rates_of[index] = rates_table.setdefault(rates, len(rates_table))
        arrays = (
            (_Rates * len(rates_table))(*(_Rates(*rates) for rates in rates_table)),
            (ctypes.c_void_p * len(grads))(*grads),
            (ctypes.c_int32 * len(rates_of))(*rates_of),
        )
        self._call.rates, self._call.grads, self._call.rates_of = (ctypes.addressof(array) for array in arrays)
        self._library.custom_adamw_step(ctypes.byref(self._call))
        # tell autograd that the weights have changed: a graph that still needs the old ones is stale
        increment_version(changed)


def _codec(*, signed: bool) -> _Codec:
    table = codec.dynamic_map(signed=signed)  # lives as long as the process
    return _Codec(table.values.data_ptr(), table.thresholds.data_ptr())


def _room(stack: Stack) -> int:
    """The longest scratch array that a stack needs: a tensor, its partner, or the Gram matrix with padded lines."""
    n, rank = stack.layout.n, stack.layout.rank
    return max(n, stack.layout.down_size, rank * (rank + LANES))


def _flatten(recipe: Recipe) -> _Recipe:
    values = {
        item.name: _number(item, getattr(technique, item.name))
        for technique in recipe.techniques
        for item in technique.settings()
    }
    return _Recipe(
        one_minus_beta1=1 - recipe.beta1,
        beta2=recipe.beta2,
        one_minus_beta2=1 - recipe.beta2,
        eps=recipe.eps,
        stochastic_rounding=recipe.stochastic_rounding,
        **values,
    )


def _number(item: Setting, value: float | str | None) -> float:
    """A setting for the kernel: of a `Literal` the index, NaN for None."""
    if isinstance(value, str):
        return item.choices.index(value)
    return math.nan if value is None else value


def _describe(stack: Stack, row: int, recipe: int) -> _Tensor:
    member, stored = stack.members[row], stack.stored

    def address(key: str) -> int | None:
        return stored[key][row].data_ptr() if key in stored else None

    return _Tensor(
        w=member.parameter.data_ptr(),
        down=None if member.down is None else member.down.data_ptr(),
        m=address("exp_avg"),
        v=address("exp_avg_sq"),
        m_peak=address("exp_avg_absmax"),
        v_peak=address("exp_avg_sq_absmax"),
        state=_State(*(address(field[0]) for field in _State._fields_)),
        n=stack.layout.n,
        rank=stack.layout.rank,
        down_columns=stack.layout.down_size // max(stack.layout.rank, 1),
        rows=stack.layout.matrix[0],
        bfloat16=stack.layout.dtype == torch.bfloat16,
        eight_bit=stack.layout.eight_bit,
        recipe=recipe,
        ordinal=member.ordinal,
    )
