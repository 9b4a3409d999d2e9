"""The peak memory of this process."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def peak_memory(device: torch.device) -> dict[str, int]:
    """The peak memory of this process so far in bytes: "of the process", and on a GPU "of the GPU"."""
    peaks = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["of the process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        import torch

        peaks["of the GPU"] = torch.cuda.max_memory_allocated(device)
    return peaks
