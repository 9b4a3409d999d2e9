"""Gradient checkpoints in host memory: the inputs of the checkpointed blocks, copied back ahead of their turn."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from library.offload.lane import Done, Lane, OutlineLane

Memory = tuple[int, torch.Size]
_AT_ONCE = 2  # inputs that are on their way to the host while blocks compute


class OffloadedCheckpoints:
    """Checkpoints a block as diffusers does, and keeps its input in host memory until its backward pass.

    Only the first argument of a block leaves the device: the others, such as the states of the text encoders, are those
    of all blocks. When one input is needed again, the copy of that before it starts.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self.outlines = OutlineLane()
        """The lane of tensors without contents, which an estimate of memory has instead of real ones."""
        self._last: weakref.ref[_Away] | None = None
        # what is being copied to the host, still on the device
        self._leaving: deque[tuple[Tensor, Done, Lane]] = deque()

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        """The block's output; diffusers' `gradient_checkpointing_func`."""
        moved = _memory_of(args[0])  # not the tensor, which autograd would keep with the hook
        with saved_tensors_hooks(lambda tensor: self._pack(tensor, moved), self._unpack):
            return checkpoint(block.__call__, *args, use_reentrant=False)

    def _pack(self, tensor: Tensor, moved: Memory) -> Tensor | _Away:
        if _memory_of(tensor) != moved:
            return tensor
        lane = self._lane if type(tensor) in (Tensor, nn.Parameter) else self.outlines
        self._leave(_AT_ONCE - 1)
        host = lane.pinned_like(tensor)
        with torch.no_grad():
            self._leaving.append((tensor.detach(), lane.copy(host, tensor), lane))
        away = _Away(host, tensor.device, lane, self._last)
        self._last = weakref.ref(away)
        return away

    def _unpack(self, packed: Tensor | _Away) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._leave(0)  # the forward pass is over
        return packed.back()

    def _leave(self, most: int) -> None:
        """Have the computation wait for copies to the host until at most so many are under way, and free the rest."""
        while len(self._leaving) > most:
            _, done, lane = self._leaving.popleft()
            lane.wait(done)


class _Away:
    """A tensor in host memory."""

    def __init__(self, host: Tensor, device: torch.device, lane: Lane, before: weakref.ref[_Away] | None) -> None:
        """`before`: what went before it, and so will be needed after it."""
        self._host, self._device, self._lane, self._before = host, device, lane, before
        self._here: tuple[Tensor, Done] | None = None

    def __del__(self) -> None:
        """A backward pass that has failed needs no copy any more; its memory is reused behind the copy."""
        if self._here is not None:
            self._lane.wait(self._here[1])

    def start_back(self) -> tuple[Tensor, Done]:
        """Start the copy to the device, unless it has been started."""
        if self._here is None:
            here = torch.empty_like(self._host, device=self._device)
            with torch.no_grad():
                self._here = here, self._lane.copy(here, self._host)
        return self._here

    def back(self) -> Tensor:
        """The tensor on the device."""
        here, done = self.start_back()
        self._here = None  # a second backward pass copies it again
        before = None if self._before is None else self._before()
        if before is not None:
            before.start_back()
        self._lane.wait(done)
        return here


def _memory_of(tensor: Tensor) -> Memory:
    """Which tensor it is, whether detached or not."""
    return tensor.untyped_storage()._cdata, tensor.shape
