"""Copies between host and device that run beside the computation."""

from __future__ import annotations

import logging
import weakref
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from library.units import human_bytes

logger = logging.getLogger(__name__)


class Done(Protocol):
    """The end of a copy, as `Lane.copy` returns it and `Lane.wait` takes it."""


class Lane(Protocol):
    """Copies one after the other, in their own order, beside the computation of one device."""

    device: torch.device

    def registered(self, count: int) -> Tensor:
        """`count` bytes of host memory that the device copies from by itself, uint8, for as long as the lane."""

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Host memory of the same kind, for a short time, without contents."""

    def copy(self, target: Tensor, source: Tensor) -> Done:
        """Queue a copy that starts when all computation queued so far is done: it may still use the target's memory,
        or be writing the source. Both tensors must be kept until `wait` has been called.

        (`Tensor.record_stream` would keep their memory until the host sees the end of the copy; but the host is far
        ahead of the device, so that nothing would become free in time.)
        """

    def wait(self, done: Done) -> None:
        """Have the computation from here on wait for the end of a copy; the host does not wait."""


class CudaLane:
    """A stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._registered: list[Tensor] = []
        weakref.finalize(self, _unregister, self._registered)

    def registered(self, count: int) -> Tensor:
        """Of its exact size: torch rounds pinned memory up to a power of two, which could double a model."""
        memory = torch.empty(count, dtype=torch.uint8)
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), count, 0)
        if int(error):
            logger.warning("%s of host memory cannot be pinned (%s): copies are slower", human_bytes(count), error)
        else:
            self._registered.append(memory)
        return memory

    def pinned_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, done: Done) -> None:
        assert isinstance(done, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(done)


class OutlineLane:
    """Copies nothing: for passes over tensors without contents, which count what is on the device.

    `host`: the most bytes of host memory that the copies would have taken at one time.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.host = 0
        self._now = 0

    def registered(self, count: int) -> Tensor:
        raise AssertionError("weights of an outline are not swapped")

    def pinned_like(self, tensor: Tensor) -> Tensor:
        with _disable_current_modes():  # such a pass would count it
            host = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
        self._now += tensor.nbytes
        self.host = max(self.host, self._now)
        weakref.finalize(host, self._forget, tensor.nbytes)
        return host

    def _forget(self, count: int) -> None:
        self._now -= count

    def copy(self, target: Tensor, source: Tensor) -> None:
        """No-op."""

    def wait(self, done: Done) -> None:
        """No-op."""


def _unregister(memories: list[Tensor]) -> None:
    """Before the memory is freed: another registration of the same addresses would fail."""
    while memories:
        torch.cuda.cudart().cudaHostUnregister(memories[-1].data_ptr())
        memories.pop()


def lane_of(device: torch.device) -> Lane | None:
    """A lane of a GPU; None for a CPU, whose memory is the host's already."""
    return CudaLane(device) if device.type == "cuda" else None
