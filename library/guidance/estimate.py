"""Estimates of memory and time before the work is done."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

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


def peak_of(work: Callable[[Callable[[Tensor], Tensor]], object]) -> int:
    """The peak bytes of the tensors that `work` makes, gradients and saved activations included.

    `work` runs on fake tensors, which have shapes and dtypes only: nothing is computed and nothing allocated, on any
    device. It is given a function that makes its inputs fake. Memory that libraries use inside an operation
    (convolution workspaces) is not counted.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _LiveBytes() as live:
        work(mode.from_tensor)
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations return, until their storage dies."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:  # a view shares the storage of its base
                    self._known.add(storage._cdata)
                    self._now += storage.nbytes()
                    self.peak = max(self.peak, self._now)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
