"""Peak bytes of work that is not done: passes over tensors with shapes and dtypes only."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def parameter_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the parameters and buffers of these modules."""
    return sum(_bytes(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers()))


def _bytes(tensor: Tensor) -> int:
    """Of a packed weight those of its parts."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def peak_of(work: Callable[[Callable[[Tensor], Tensor]], object], modules: Sequence[nn.Module] = ()) -> int:
    """The peak bytes of the tensors that `work` makes, gradients and saved activations included.

    `work` runs on fake tensors, which have shapes and dtypes only: nothing is computed and nothing allocated, on any
    device. It is given a function that makes its inputs fake. `modules`: those that it runs, loaded or on the meta
    device, which counts as the CPU; their own weights are not counted. Memory that libraries use inside an operation
    (convolution workspaces) is not counted either.
    """
    mode = _mode()
    with mode, _with_fake_weights(modules, mode.from_tensor), LiveBytes() as live:
        work(mode.from_tensor)
    return live.peak


@lru_cache(maxsize=1)
def _mode() -> Any:
    """One for all passes, so that the fake weights serve all of them: making them takes half of a pass."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


_frozen: dict[tuple[object, ...], Tensor] = {}  # fake weights without contents: one serves all of its shape


@contextmanager
def _with_fake_weights(modules: Sequence[nn.Module], fake: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A context in which all weights and buffers of these modules are fake; gradients that they get stay inside."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    fakes: dict[int, Tensor] = {}  # weights can be shared
    for module in (inner for outer in modules for inner in outer.modules()):
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                kept.append((table, name, tensor))
                if id(tensor) not in fakes:
                    fakes[id(tensor)] = _fake_weight(tensor, fake, is_parameter=table is module._parameters)
                table[name] = fakes[id(tensor)]
    try:
        yield
    finally:
        for table, name, tensor in kept:
            table[name].grad = None
            table[name] = tensor


def _fake_weight(tensor: Tensor, fake: Callable[[Tensor], Tensor], *, is_parameter: bool) -> Tensor:
    key = (is_parameter, tensor.shape, tensor.stride(), tensor.dtype, tensor.is_meta, tensor.device)
    is_shared = not tensor.requires_grad and type(tensor) in (Tensor, nn.Parameter)
    if is_shared and key in _frozen:
        return _frozen[key]
    made = torch.empty_like(tensor, device="cpu") if tensor.is_meta else fake(tensor.detach())
    if is_parameter:
        made = nn.Parameter(made, tensor.requires_grad)
    if is_shared:
        _frozen[key] = made
    return made


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, real or fake, until their storage dies. Storages that are there
    before, such as weights, are not counted, nor are views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._add(leaf, counts=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, counts=True)
        return result

    def _add(self, tensor: Tensor, *, counts: bool) -> None:
        if is_traceable_wrapper_subclass(tensor):
            return  # its parts come by themselves
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            size = storage.nbytes() if counts else 0
            self._known.add(storage._cdata)
            self._now += size
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
