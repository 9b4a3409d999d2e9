"""Peak bytes of work that is not done: passes over tensors with shapes and dtypes only.

torch's FakeTensorMode does the same, several times slower: here nothing stands behind a tensor, and the shape of a
result is looked up where an operation has had arguments of the same shapes before.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

SMALL = 4096
"""Tensors of up to this many numbers that are made during a pass are real, so that code can read them."""


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

    `work` runs on outlines, which have shapes and dtypes only: nothing is computed and nothing allocated. It is given a
    function that makes its inputs outlines. `modules`: those that it runs, loaded or on the meta device; their own
    weights are not counted. Outlines count as on the CPU, wherever their originals are. Memory that libraries use
    inside an operation (convolution workspaces) is not counted.
    """
    live = _LiveBytes()
    with live, _outlined_weights(modules):
        work(_outline_of)
    return live.peak


# -- tensors without contents


class _Memory:
    """What the views of one outline share: it lives as long as one of them."""

    __slots__ = ("__weakref__",)


class _Outline(Tensor):
    """A tensor that has no contents."""

    memory: _Memory

    @staticmethod
    def __new__(cls, form: _Form, memory: _Memory) -> _Outline:
        made: _Outline = Tensor._make_wrapper_subclass(
            cls,
            form.size,
            strides=form.stride,
            storage_offset=form.offset,
            dtype=form.dtype,
            device=torch.device("cpu"),
        )
        made.memory = memory
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own do

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a function that is switched off
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} on a tensor without contents, outside of a pass")


@dataclass(frozen=True)
class _Form:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Form:
        return cls(tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


def _outline_of(tensor: Tensor) -> Tensor:
    """Of a packed weight one with outlines as parts. Its bytes are not counted."""
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        parts = {name: _outline_of(getattr(tensor, name)) for name in names}
        made: Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
        return made
    return _Outline(_Form.of(tensor), _Memory())


@contextmanager
def _outlined_weights(modules: Sequence[nn.Module]) -> Iterator[None]:
    """A context in which all weights and buffers of these modules are outlines; gradients that they get stay inside."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Any] = {}  # weights can be shared
    for module in (inner for outer in modules for inner in outer.modules()):
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                kept.append((table, name, tensor))
                if id(tensor) not in made:
                    made[id(tensor)] = outline = _outline_of(tensor.detach())
                    outline.requires_grad_(tensor.requires_grad)
                    outline._is_param = table is module._parameters  # as nn.Parameter marks tensors of other classes
                table[name] = made[id(tensor)]
    try:
        yield
    finally:
        for table, name, tensor in kept:
            table[name].grad = None
            table[name] = tensor


# -- operations on them


@dataclass(frozen=True)
class _Made:
    """A tensor in an operation's result. `argument`: the one that it is, or is a view of; None: its storage, of
    `nbytes`, is new."""

    form: _Form
    argument: int | None
    is_argument: bool
    nbytes: int


@dataclass(frozen=True)
class _Result:
    """What an operation returns. `value`: with the numbers of `tensors` in their places."""

    tensors: tuple[_Made, ...]
    value: Any


class _Place(int):
    """Stands for a tensor in a value: its number."""


_results: dict[object, _Result] = {}  # by operation and arguments, of all passes


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until they die."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in (_Outline, Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # a packed weight decodes first
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        key = func, _key_of(args, tensors), _key_of(kwargs, tensors)
        is_real = tensors and not any(type(tensor) is _Outline for tensor in tensors)
        if is_real and (func._schema.is_mutable or all(tensor.numel() <= SMALL for tensor in tensors)):
            return func(*args, **kwargs)  # a real tensor that is written to needs no new memory
        if (result := _results.get(key)) is None:
            result = _results[key] = _result_of(func, args, kwargs, tensors)
        if not tensors and all(math.prod(made.form.size) <= SMALL for made in result.tensors):
            return func(*args, **_with_device(kwargs, "cpu"))
        made = [self._made(item, tensors) for item in result.tensors]
        return _replaced(result.value, _Place, lambda place: made[place])

    def _made(self, made: _Made, arguments: Sequence[Tensor]) -> Tensor:
        if made.argument is None:
            return _Outline(made.form, self._counted(made.nbytes))
        argument = arguments[made.argument]
        if made.is_argument:
            return argument
        return _Outline(made.form, argument.memory if isinstance(argument, _Outline) else _Memory())

    def _counted(self, nbytes: int) -> _Memory:
        memory = _Memory()
        self._now += nbytes
        self.peak = max(self.peak, self._now)
        weakref.finalize(memory, self._forget, nbytes)
        return memory

    def _forget(self, nbytes: int) -> None:
        self._now -= nbytes


def _key_of(value: Any, tensors: list[Tensor]) -> object:
    """All of an argument on which the form of a result depends. Its tensors are added to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.size(), value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(_key_of(item, tensors) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key_of(item, tensors)) for name, item in value.items())
    return type(value), value  # 1, 1.0 and True are equal


def _result_of(func: Any, args: Any, kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> _Result:
    """By torch's kernels for the meta device."""
    metas = [_meta_of(_Form.of(tensor)) for tensor in tensors]
    order = iter(metas)
    given = _replaced(args, Tensor, lambda _: next(order))
    named = _replaced(_with_device(kwargs, "meta"), Tensor, lambda _: next(order))
    owners = {meta.untyped_storage()._cdata: place for place, meta in reversed([*enumerate(metas)])}
    found: list[_Made] = []

    def noted(tensor: Tensor) -> _Place:
        same = next((place for place, meta in enumerate(metas) if meta is tensor), None)
        storage = tensor.untyped_storage()
        argument = owners.get(storage._cdata) if same is None else same
        found.append(_Made(_Form.of(tensor), argument, same is not None, storage.nbytes()))
        return _Place(len(found) - 1)

    value = _replaced(func(*given, **named), Tensor, noted)
    return _Result(tuple(found), value)


def _meta_of(form: _Form) -> Tensor:
    last = sum((side - 1) * stride for side, stride in zip(form.size, form.stride, strict=True))
    storage = torch.empty(form.offset + last + 1, dtype=form.dtype, device="meta")
    return storage.as_strided(form.size, form.stride, form.offset)


def _with_device(kwargs: Mapping[str, Any], device: str) -> dict[str, Any]:
    return {name: torch.device(device) if name == "device" else value for name, value in kwargs.items()}


def _replaced(value: Any, kind: type, by: Callable[[Any], object]) -> Any:
    """The value with everything of this kind in it replaced."""
    if isinstance(value, kind):
        return by(value)
    if isinstance(value, list | tuple):
        return type(value)([_replaced(item, kind, by) for item in value])
    if isinstance(value, dict):
        return {name: _replaced(item, kind, by) for name, item in value.items()}
    return value
