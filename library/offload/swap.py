"""Block swapping: frozen weights live in host memory and are copied to the device ahead of their turn.

The weights of the Linear and Conv2d layers of some of the denoiser's blocks lie in pinned host memory, each block's in
one piece. On the device two buffers, as large as the largest of these blocks, take turns: while one block computes, the
next one in the direction of travel is copied into the other. Nothing is copied back, since nothing of it changes.
Biases and norms stay on the device.

`layer.weight` is the tensor in host memory. What computes with a weight fetches it (`library.quantization.frozen`), and
any order of fetching is right; another one than the declared order only waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from library.errors import UserError
from library.offload.lane import Done, Lane
from library.quantization.frozen import compute_swapped

Layer = nn.Linear | nn.Conv2d
Block = Sequence[Layer]
T = TypeVar("T")

_ALIGNED = 256  # bytes, as the memory that a GPU allocates
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Cost:
    """Bytes that swapping takes: `host`, of the swapped weights, and `buffers`, on the device."""

    host: float
    buffers: float

    @classmethod
    def of(cls, sizes: Sequence[float]) -> Cost:
        """`sizes`: bytes of each swapped block."""
        return cls(sum(sizes), 2 * max(sizes, default=0))

    @property
    def saved(self) -> float:
        """Bytes of the device."""
        return self.host - self.buffers


def layers_in(*modules: nn.Module) -> list[Layer]:
    """The layers whose weights can be swapped, in the order of their declaration."""
    found = [layer for module in modules for layer in module.modules()]
    return [
        layer
        for layer in found
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros")
    ]


def chosen(blocks: Sequence[T], asked: int | str) -> list[T]:
    """The blocks that are swapped if `asked` of them shall be: a number, or "50%" of all.

    They are spread evenly, so that those in between leave time for the copies, and those of a smaller number are among
    those of a larger one: the fractional parts of multiples of the golden ratio. UserError for more than there are.
    """
    number = math.ceil(len(blocks) * float(asked[:-1]) / 100) if isinstance(asked, str) else asked
    if number > len(blocks):
        raise UserError(f"--blocks_to_swap {asked}: the model has {len(blocks)} blocks")
    places = sorted(range(len(blocks)), key=lambda place: place * _GOLDEN % 1)[:number]
    return [blocks[place] for place in sorted(places)]


def swapping_cost(blocks: Iterable[Block]) -> Cost:
    """The bytes that swapping these blocks, or outlines of them, takes."""
    return Cost.of([sum(_nbytes(layer.weight) for layer in block) for block in blocks])


def refuse_useless(blocks: Sequence[Block], asked: int | str) -> None:
    """UserError if there are fewer blocks than `asked`, or if swapping so few saves nothing."""
    if swapping_cost(chosen(blocks, asked)).saved <= 0:
        raise UserError(
            f"--blocks_to_swap {asked}: saves nothing, because two buffers of the largest swapped block's size stay on "
            f"the device; the model has {len(blocks)} blocks"
        )


class Ring:
    """The two buffers on the device, and the blocks that are swapped, in the order in which they compute."""

    def __init__(self, blocks: Sequence[Block], lane: Lane) -> None:
        """Moves the weights of these blocks into pinned memory, block by block, and has their layers fetch them.

        To be called before adapters are attached and after others are merged in. All weights must be frozen.
        """
        self._lane = lane
        self._host: list[Tensor] = []  # of each block, uint8
        held = [self._moved(block) for block in blocks]
        largest = max(len(memory) for memory in self._host)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=lane.device) for _ in range(2)]
        # [buffer][block][layer]: the layer's weight while the block is in that buffer
        self._weights = [[[weight.within(buffer) for weight in block] for block in held] for buffer in self._buffers]
        self._block_in: list[int | None] = [None, None]
        self._copied: list[Done | None] = [None, None]  # what nothing has waited for yet
        self._current, self._buffer = -1, 0
        for number, block in enumerate(blocks):
            for place, layer in enumerate(block):
                compute_swapped(layer, partial(self.weight, number, place))

    def __del__(self) -> None:
        """The buffers' memory is reused behind a copy that nothing has waited for."""
        for copied in getattr(self, "_copied", ()):
            if copied is not None:
                self._lane.wait(copied)

    def _moved(self, block: Block) -> list[_Held]:
        """Copies a block's weights into one piece of host memory; afterwards they are views of it."""
        held, end = [], 0
        for layer in block:
            assert not layer.weight.requires_grad, "only frozen weights can be swapped"
            weight, end = _Held.at(end, layer.weight)
            held.append(weight)
        memory = self._lane.registered(end)
        for layer, weight in zip(block, held, strict=True):
            weight.fill(memory, layer.weight)
            layer.weight = nn.Parameter(weight.within(memory), requires_grad=False)
        self._host.append(memory)
        return held

    def weight(self, block: int, place: int) -> Tensor:
        """The weight of a block's layer on the device; valid until a weight of another block is asked for."""
        if block != self._current:
            self._enter(block)
        return self._weights[self._buffer][block][place]

    def _enter(self, block: int) -> None:
        """Have the computation from here on use a block, and start the copy of the next one in this direction."""
        if block not in self._block_in:
            self._load(block, 1 - self._buffer)
        self._buffer = self._block_in.index(block)
        if (copied := self._copied[self._buffer]) is not None:
            self._lane.wait(copied)
            self._copied[self._buffer] = None
        following = block + (1 if block > self._current else -1)
        self._current = block
        if 0 <= following < len(self._host) and following not in self._block_in:
            self._load(following, 1 - self._buffer)

    def _load(self, block: int, buffer: int) -> None:
        """Start a copy. It waits for the computation that is queued, the last with what the buffer holds now."""
        memory = self._host[block]
        with torch.no_grad(), _disable_current_modes():  # an estimate on fake tensors must not leave an empty buffer
            self._copied[buffer] = self._lane.copy(self._buffers[buffer][: len(memory)], memory)
        self._block_in[buffer] = block


@dataclass(frozen=True)
class _Plain:
    """Where a plain tensor lies within the bytes of its block."""

    start: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def within(self, memory: Tensor) -> Tensor:
        piece = memory[self.start : self.start + self.nbytes].view(self.dtype)
        return piece.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class _Held:
    """A weight without its memory: the places of its plain tensors by name, and how it is made of such tensors."""

    plain: dict[str, _Plain]
    made_of: Callable[[dict[str, Tensor]], Tensor]

    @classmethod
    def at(cls, start: int, weight: Tensor) -> tuple[_Held, int]:
        """A weight whose bytes begin at `start`, and where the next one's can begin."""
        plain = {}
        for name, tensor in plain_tensors(weight).items():
            stride = torch.empty_like(tensor, device="meta").stride()  # its own, unless it has gaps
            plain[name] = _Plain(start, tensor.nbytes, tensor.dtype, tensor.shape, stride)
            start = -(-(start + tensor.nbytes) // _ALIGNED) * _ALIGNED
        return cls(plain, _maker(weight)), start

    def fill(self, memory: Tensor, weight: Tensor) -> None:
        with torch.no_grad():
            for name, tensor in plain_tensors(weight).items():
                self.plain[name].within(memory).copy_(tensor)

    def within(self, memory: Tensor) -> Tensor:
        """The weight on views of these bytes."""
        return self.made_of({name: place.within(memory) for name, place in self.plain.items()})


def _maker(weight: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    """Makes a weight of this kind of plain tensors like its own."""
    if not is_traceable_wrapper_subclass(weight):
        return lambda plain: plain[""]
    kind, (_, context), shape, stride = type(weight), weight.__tensor_flatten__(), weight.shape, weight.stride()
    return lambda plain: kind.__tensor_unflatten__(plain, context, shape, stride)


def plain_tensors(weight: Tensor) -> dict[str, Tensor]:
    """The tensors with memory of their own that a weight consists of: itself, named "", or a packed one's by name."""
    if not is_traceable_wrapper_subclass(weight):
        return {"": weight}
    names, _ = weight.__tensor_flatten__()
    return {name: getattr(weight, name) for name in names}


def _nbytes(weight: Tensor) -> int:
    return sum(tensor.nbytes for tensor in plain_tensors(weight).values())
