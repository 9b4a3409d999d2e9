"""Random draws by key, and networks without any.

Every draw is a pure function of its key, usually (seed, epoch, repeat, sample, purpose), and never comes from a
running stream. So the result depends neither on the number of workers or processes nor on where a run was resumed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

Key = int | float | str | bool | None


def key_of(*parts: Key) -> int:
    """A 64-bit number that is the same for the same parts on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def python_random(*parts: Key) -> random.Random:
    """A `random.Random` for this key: shuffles, choices, coin flips."""
    return random.Random(key_of(*parts))


def torch_generator(*parts: Key) -> torch.Generator:
    """A CPU generator for this key. Draws are made on the CPU so that every device sees the same numbers."""
    import torch

    # torch keeps 64-bit seeds as signed numbers: stay in the positive half
    return torch.Generator().manual_seed(key_of(*parts) >> 1)


def uniform() -> float:
    """A number in [0, 1) from torch's stream.

    In an estimate of memory, whose tensors have no values, it is just below 1: no layer is dropped then, and a drawn
    size is the largest.
    """
    import torch

    draw = torch.rand(())
    return draw.item() if type(draw) is torch.Tensor else 1 - 2**-24


@contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """A context in which a network is as it is used: for pictures and measurements between the steps of training."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
