"""Filling a module from a file, one tensor at a time.

The module is built on the meta device, so that its own random weights never exist. Then each parameter gets its weights
in one of two ways, neither of which needs more memory than the finished module and a small buffer:

* on the CPU in the file's own element type, it is a private mapping of its part of the file. Nothing is copied, what is
  never used is never read, and several processes share the pages. The file may be deleted meanwhile, not overwritten.
* otherwise it is allocated as wanted and the file is read through the buffer. Read, not mapped: the pages of a mapping
  count as the process's memory, beside the converted weights. A GPU reads the buffer by itself and changes the type.
  A weight with a scale beside it is in fp32 for a moment.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from torch import nn

from library.errors import UserError
from library.files.tensors import ITEM_SIZE, TensorEntry
from library.models.checkpoints.base_model import few
from library.progress import bar

Change = Callable[[torch.Tensor], torch.Tensor]

_BUFFER = 1 << 24  # bytes read at a time where the element type changes


def fill(
    module: nn.Module,
    entries: Mapping[str, TensorEntry],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    where: str,
    changes: Mapping[str, Change] = MappingProxyType({}),
) -> None:
    """Fill every parameter of `module` (on the meta device) from `entries`: frozen, as `dtype` on `device`; and the
    buffers that its files have.

    `changes`: by a parameter's name, from the weight that was read to the tensor that the module gets in its place; of
    these one weight exists at a time. `where` names module and file in errors. Raises UserError unless names and shapes
    match exactly; a 1 × 1 convolution and a Linear of the same weights count as the same shape, because files differ in
    which they hold.
    """
    parameters, buffers = dict(module.named_parameters()), _buffers(module)
    wanted = {**parameters, **buffers}
    check_fit(module, entries, where)
    device = torch.device(device)
    names = sorted(wanted, key=lambda name: (str(entries[name].file), entries[name].offset))
    with Reader() as reader, _one_thread():
        for name in bar(names, desc="weights", unit="tensor") if changes else names:
            change = changes.get(name)
            weight = reader.read(entries[name], dtype=dtype, device=device, mapped=change is None)
            weight = weight.view(wanted[name].shape)
            if change is not None:
                weight = change(weight)
            owner, _, leaf = name.rpartition(".")
            if name in buffers:
                module.get_submodule(owner).register_buffer(leaf, weight)
            else:
                module.get_submodule(owner).register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
    for name, tensor in module.named_buffers():
        assert not tensor.is_meta, f"{where}: the buffer {name} has no content"


def check_fit(module: nn.Module, entries: Mapping[str, TensorEntry], where: str) -> None:
    """UserError unless `entries` have the names and shapes of the module's parameters and buffers, as in `fill`."""
    wanted = {**dict(module.named_parameters()), **_buffers(module)}
    missing = [name for name in wanted if name not in entries]
    unknown = [name for name in entries if name not in wanted]
    if missing or unknown:
        raise UserError(
            f"{where}: the weights do not fit the architecture"
            + (f"; {len(missing)} missing: {few(missing, 3)}" if missing else "")
            + (f"; {len(unknown)} unknown: {few(unknown, 3)}" if unknown else "")
        )
    for name, tensor in wanted.items():
        entry = entries[name]
        if _core(entry.shape) != _core(tensor.shape):
            raise UserError(
                f"{where}: '{name}' has the shape {list(entry.shape)} where {list(tensor.shape)} is expected"
            )
        if "float" not in entry.dtype:
            raise UserError(f"{where}: '{name}' holds {entry.dtype}, which are no weights")


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that files have, such as Stable Diffusion 3's table of places."""
    persistent = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in persistent}


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape without the trailing ones of a 1 × 1 convolution."""
    core = list(shape)
    while core and core[-1] == 1:
        core.pop()
    return tuple(core)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A context with one thread. Changing an element type is bound by memory: more threads gain little, and if other
    programs use the cores, a thousand small parallel regions that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Reader:
    """Reads tensors; keeps the files open and one buffer between them. A context."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._maps: dict[Path, mmap.mmap] = {}  # a map stays valid, without its file, as long as a tensor uses it
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_error: object) -> None:
        for file in self._files.values():
            file.close()

    def read(
        self, entry: TensorEntry, *, dtype: torch.dtype, device: torch.device, mapped: bool = False
    ) -> torch.Tensor:
        """The elements of `entry` [count], in the order of its shape. `mapped`: as a mapping where that is possible."""
        if entry.scale is not None:
            factor = self.read(entry.scale, dtype=torch.float32, device=torch.device("cpu")).item()
            return self.read(replace(entry, scale=None), dtype=torch.float32, device=device).mul_(factor).to(dtype)
        if entry.halves_exchanged:
            first, second = self.read(entry.exchanged(), dtype=dtype, device=device).chunk(2)
            return torch.cat([second, first])
        if entry.file not in self._files:
            self._files[entry.file] = entry.file.open("rb", buffering=0)
        file, source = self._files[entry.file], getattr(torch, entry.dtype)
        if entry.stride is not None and entry.count:
            return self._strided(file, entry).to(device=device, dtype=dtype)
        aligned = entry.offset % ITEM_SIZE[entry.dtype] == 0
        if mapped and source == dtype and device.type == "cpu" and aligned and entry.count:
            if entry.file not in self._maps:
                self._maps[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return torch.frombuffer(self._maps[entry.file], dtype=dtype, count=entry.count, offset=entry.offset)
        return self._converted(file, entry, source, torch.empty(entry.count, dtype=dtype, device=device))

    def _converted(self, file: BinaryIO, entry: TensorEntry, source: torch.dtype, target: torch.Tensor) -> torch.Tensor:
        on_gpu = target.device.type == "cuda"
        if not len(self._buffer):
            self._buffer = torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=on_gpu)
        file.seek(entry.offset)
        step = _BUFFER // ITEM_SIZE[entry.dtype]
        for start in range(0, entry.count, step):
            count = min(step, entry.count - start)
            piece = self._buffer[: count * ITEM_SIZE[entry.dtype]]
            read_bytes(file, piece, entry.file)
            moved = piece.to(target.device) if on_gpu else piece  # else the CPU would convert, in one thread
            target[start : start + count].copy_(moved.view(source))
        return target

    @staticmethod
    def _strided(file: BinaryIO, entry: TensorEntry) -> torch.Tensor:
        """A transposed or sliced tensor, as old pickles may hold: read its whole extent, then pick."""
        assert entry.stride is not None
        whole = read_extent(file, entry)
        return whole.as_strided(entry.shape, entry.stride).reshape(-1).clone()


def read_extent(file: BinaryIO, entry: TensorEntry) -> torch.Tensor:
    """All elements from the first of a tensor to its last, in the order of the file."""
    whole = torch.empty(entry.extent, dtype=getattr(torch, entry.dtype))
    file.seek(entry.offset)
    read_bytes(file, whole.view(torch.uint8), entry.file)
    return whole


def read_bytes(file: BinaryIO, target: torch.Tensor, path: Path) -> None:
    """Fill `target` (uint8, on the CPU) from the file's position on."""
    view = target.numpy().data
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{path}: ended while it was being read")
        done += count
