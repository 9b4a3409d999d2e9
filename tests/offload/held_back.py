"""A lane on the CPU that behaves as badly as a GPU's may: what it copies is only there once it is waited for."""

from __future__ import annotations

import torch
from torch import Tensor

from library.offload.lane import Done


class HeldBackLane:
    """Copies at the last moment, when the end of a copy is waited for; until then the target holds NaN.

    `hide` puts NaN into the host memory as well, so that whatever reads a swapped weight there is found.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.copies: list[tuple[int, int]] = []  # (bytes, of them to host memory)
        self.waits: list[int] = []  # for the copies of these numbers, from 1
        self._queue: list[tuple[Tensor, Tensor]] = []
        self._done = 0
        self.memories: list[Tensor] = []
        self._hidden: dict[int, Tensor] = {}
        self._pinned: dict[int, Tensor] = {}  # kept, so that no address is used twice

    def registered(self, count: int) -> Tensor:
        self.memories.append(torch.empty(count, dtype=torch.uint8))
        return self.memories[-1]

    def pinned_like(self, tensor: Tensor) -> Tensor:
        pinned = torch.empty_like(tensor)
        return self._pinned.setdefault(pinned.data_ptr(), pinned)

    def copy(self, target: Tensor, source: Tensor) -> int:
        target.fill_(255 if target.dtype == torch.uint8 else torch.nan)
        self._queue.append((target, source))
        self.copies.append((target.nbytes, target.nbytes if target.data_ptr() in self._pinned else 0))
        return len(self.copies)

    def wait(self, done: Done) -> None:
        assert isinstance(done, int)
        self.waits.append(done)
        while self._done < done:
            target, source = self._queue.pop(0)
            target.copy_(self._hidden.get(source.data_ptr(), source))
            self._done += 1

    def hide(self) -> None:
        for memory in self.memories:
            self._hidden[memory.data_ptr()] = memory.clone()
            memory.fill_(255)
