"""The network as it was at the start of the run, in place of the one that is trained, for a prediction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class PreviousNetwork:
    """Holds a copy of the network's weights; make it before the first step, or before a state is loaded."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._own = [*network.parameters(), *network.buffers()]
        self._start = [tensor.detach().clone() for tensor in self._own]

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the network has its first weights, without dropout. Afterwards it has its own again, the
        same tensors in memory: the gradients of predictions made before stay what they are.

        Only for predictions without gradients.
        """
        now = [tensor.data for tensor in self._own]
        training, cached = self._network.training, torch.is_autocast_cache_enabled()
        # autocast keeps 16-bit copies of weights by the tensor, whose contents are others in here
        torch.set_autocast_cache_enabled(False)
        self._network.eval()
        self._put(self._start)
        try:
            yield
        finally:
            self._put(now)
            self._network.train(training)
            torch.set_autocast_cache_enabled(cached)

    def _put(self, tensors: list[torch.Tensor]) -> None:
        for own, tensor in zip(self._own, tensors, strict=True):
            own.data = tensor
