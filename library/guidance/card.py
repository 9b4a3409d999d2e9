"""The memory that a run may use: of the GPU, or as --gpu_memory or --fit say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.config.fields import memory_bytes
from library.units import human_bytes

if TYPE_CHECKING:
    from library.config.options import Options

CONTEXT = 2**29
"""Bytes that CUDA itself takes in a process, beside all tensors: 0.3 to 0.6 GiB by card and driver."""
MARGIN = 0.05
"""The share of the memory that is left free: what the estimate leaves out (workspaces, pieces between tensors)."""


@dataclass(frozen=True)
class Card:
    """`total`, `free`: bytes; `name`: in messages. `context`: bytes that are taken beside all tensors."""

    name: str
    total: int
    free: int
    context: int = CONTEXT

    @property
    def usable(self) -> int:
        """Bytes for tensors."""
        return max(0, int(self.free * (1 - MARGIN)) - self.context)

    def __str__(self) -> str:
        free = "" if self.free == self.total else f", {human_bytes(self.free)} free"
        return f"{self.name}: {human_bytes(self.total)}{free}"


def card_of(options: Options) -> Card | None:
    """The card of --fit or --gpu_memory, else the GPU of this process; None where there is neither."""
    guidance = options.guidance
    for option, word in (("fit", guidance.fit), ("gpu_memory", guidance.gpu_memory)):
        if word and word != "auto":
            size = memory_bytes(word)
            return Card(f"--{option} {word}", size, size)
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved()  # what this process has taken is part of what its run needs
    return Card(torch.cuda.get_device_name(), total, free, context=0)  # which is taken once it is asked
