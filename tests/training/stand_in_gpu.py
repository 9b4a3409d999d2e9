"""The meta device in a GPU's place: whatever would stop a GPU is seen, though nothing is computed.

A GPU works off what the host has queued. It has to stop where the host reads a result, or puts a number on it by an
ordinary copy; and a mixture of tensors on both is an error. Meta tensors have a device of their own and no contents, so
a step on them goes the same way, and these modes see each operation of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from library import gpu
from library.run import start

META = torch.device("meta")


def place_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the program find the stand-in as its device."""
    make = start.make_accelerator

    def placed(plan: Any) -> Any:
        accelerator = make(plan)
        for state in (PartialState, AcceleratorState):
            state._shared_state["device"] = META
        assert accelerator.device == META
        return accelerator

    monkeypatch.setattr(start, "make_accelerator", placed)
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled  # they know no such device: a step in fp32

    def _autocast(kind: str, *more: Any, **named: Any) -> Any:
        return nullcontext() if kind == "meta" else autocast(kind, *more, **named)

    monkeypatch.setattr(torch, "autocast", _autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and is_enabled(*kind))


class _Reads(TorchDispatchMode):
    """Lists host reads, each answered with 0.5, and ordinary copies to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.stops: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if tensor.device == META]
        here = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.dim()]
        if there and name == "_local_scalar_dense":
            self.reads.append(_place())
            return 0.5
        to = kwargs.get("device")
        if there and name == "_to_copy" and to is not None and torch.device(to).type == "cpu":
            self.reads.append(_place())
            return torch.full(there[0].shape, 0.5, dtype=kwargs.get("dtype") or there[0].dtype)
        if there and name in ("nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal"):
            self.reads.append(_place())
        copied = (name == "_to_copy" and to is not None and torch.device(to) == META and not there) or (
            name == "copy_" and there and here
        )
        if (copied and not _in_to_device()) or (there and here and name != "copy_"):
            self.stops.append(f"{name} {_place()}")
        return func(*args, **kwargs)


class _Numbers(TorchFunctionMode):
    """Lists numbers of the host that are put on the device: no operation shows these copies."""

    def __init__(self) -> None:
        super().__init__()
        self.stops: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            given, device = args[0] if args else kwargs.get("data"), kwargs.get("device")
            is_there = isinstance(given, Tensor) and given.device == META
            if device is not None and torch.device(device) == META and not is_there:
                self.stops.append(f"{func.__name__} {_place()}")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == META:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(index, list) for index in indices):
                self.stops.append(f"a list as index {_place()}")
        return func(*args, **kwargs)


class Stops:
    """What stopped the stand-in, each with the line of this project's that did it."""

    def __init__(self, reads: list[str], stops: list[str]) -> None:
        self.reads, self.copies = reads, stops


@contextmanager
def watched() -> Iterator[Stops]:
    """Look at all that is done inside."""
    stops = Stops([], [])
    with _Reads() as dispatched, _Numbers() as called:
        yield stops
    stops.reads, stops.copies = dispatched.reads, dispatched.stops + called.stops


def _place() -> str:
    """The innermost line of the library, or of networks, that runs."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename.replace("\\", "/")
        if ("/library/" in path or "/networks/" in path) and "/site-packages/" not in path:
            return f"in {path.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _in_to_device() -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code is gpu.to_device.__code__:
            return True
        frame = frame.f_back
    return False
