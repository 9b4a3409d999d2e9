"""State in CUDA's unified memory: it moves to the host when the GPU's memory runs short, and back when it is used."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

import torch
from torch import Tensor

_ATTACH_GLOBAL = 1  # cudaMemAttachGlobal: every stream may use the memory


@lru_cache
def runtime() -> ctypes.CDLL | None:
    """The CUDA runtime that torch has loaded; None without CUDA."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    major = torch.version.cuda.split(".")[0]
    for name in (f"libcudart.so.{major}", f"cudart64_{major}.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, paged: bool) -> Tensor:
    """Zeros, in unified memory if that is wanted and the device is CUDA."""
    library = runtime() if paged and device.type == "cuda" else None
    size = math.prod(shape) * dtype.itemsize
    if library is None or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    with torch.cuda.device(device):
        return torch.as_tensor(_Managed(library, size), device=device).view(dtype).view(shape).zero_()


class _Managed:
    """Unified memory that is freed with the last tensor that uses it (torch keeps a reference to this object)."""

    def __init__(self, library: ctypes.CDLL, size: int) -> None:
        pointer = ctypes.c_void_p()
        code = library.cudaMallocManaged(ctypes.byref(pointer), ctypes.c_size_t(size), ctypes.c_uint(_ATTACH_GLOBAL))
        if code != 0 or pointer.value is None:
            raise MemoryError(f"CUDA gave no {size} bytes of unified memory (error {code})")
        self._library, self._pointer = library, pointer
        # the protocol by which torch uses foreign CUDA memory without copying it
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer.value, False),
            "version": 3,
        }

    def __del__(self) -> None:
        if hasattr(self, "_pointer"):
            self._library.cudaFree(self._pointer)
