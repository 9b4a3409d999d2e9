"""A weight that is held in a packed form and looks like the weight itself.

`shape` and `dtype` are those of the weight that it decodes to. Code that does not know about it gets the decoded
values: every operation of torch decodes first. What computes with it often, `frozen.decoded`, calls `decode` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from library.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

aten = torch.ops.aten
_PART_BY_PART = {aten.detach.default, aten.alias.default, aten.clone.default, aten._pin_memory.default}


class PackedWeight(Tensor):
    """A frozen weight in one of quantization.FORMATS. A format has `PARTS` and `decode`.

    The parts are plain tensors under their names, on one device. Each may be replaced by another of its shape and dtype
    on that device. The weight cannot be written to.
    """

    PARTS: ClassVar[tuple[str, ...]]

    @staticmethod
    def __new__(cls, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> PackedWeight:
        """`parts`: by PARTS. `shape`, `dtype`: of the weight."""
        device = parts[cls.PARTS[0]].device
        made: PackedWeight = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        return made

    def __init__(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
        for name in self.PARTS:
            setattr(self, name, parts[name])

    def decode(self) -> Tensor:
        """The weight as a plain tensor, in its shape and dtype."""
        raise NotImplementedError

    @property
    def parts(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.PARTS}

    def with_parts(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same weight with each part changed: moved, copied."""
        return type(self)({name: change(part) for name, part in self.parts.items()}, self.shape, self.dtype)

    # -- for torch

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return list(self.PARTS), self.dtype

    @classmethod
    def __tensor_unflatten__(
        cls, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: torch.Size, _stride: Sequence[int]
    ) -> Self:
        return cls(parts, shape, dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own do

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a function that is switched off
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, PackedWeight):
            if func in _PART_BY_PART:
                return first.with_parts(lambda part: func(part))
            if func is aten._to_copy.default and kwargs.get("dtype", first.dtype) in (None, first.dtype):
                where = {name: kwargs[name] for name in ("device", "non_blocking") if name in kwargs}
                return first.with_parts(lambda part: part.to(copy=True, **where))
        if func._schema.is_mutable and any(isinstance(arg, PackedWeight) for arg in _written(func, args, kwargs)):
            raise TypeError(f"{func}: a packed weight cannot be written to")
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch's has names
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, {self.device})"


def _plain(value: object) -> object:
    return value.decode() if isinstance(value, PackedWeight) else value


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the operation writes to."""
    schema = func._schema.arguments
    given = dict(zip((argument.name for argument in schema), args, strict=False)) | dict(kwargs)
    return [
        given.get(argument.name)
        for argument in schema
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def largest(weight: Tensor) -> Tensor:
    """The largest magnitude of each output channel, fp32 [out]. UserError for NaN and infinite weights."""
    found = weight.flatten(1).abs().amax(1).float()
    if not found.isfinite().all():
        raise UserError("NaN or infinite weights")
    return found
