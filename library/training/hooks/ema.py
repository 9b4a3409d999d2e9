"""A running average of the network's weights, which is often better than the last of them.

With the weights w after step n (from 0) it becomes d · average + (1 - d) · w, d = min(decay, (1 + n) / (10 + n)), from
the weights before training on. This warm-up is the usual one (TensorFlow's and diffusers'): a long average would
otherwise be dominated by the beginning, where a LoRA does nothing. The average is kept in fp32: in bf16 steps of 0.1
percent would be rounded away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from library.training.hook import Hook, StateDict, Step
from library.training.run import Run


class Ema(Hook[Run]):
    """Needs 4 bytes per trained parameter, and a copy of the weights while it replaces them."""

    name = "average"

    def __init__(self, parameters: Sequence[nn.Parameter], *, decay: float, purposes: Collection[str]) -> None:
        """`purposes`: its uses, of "validate", "sample" and "save"."""
        self.parameters, self.decay, self.purposes = parameters, decay, frozenset(purposes)
        self.average = [parameter.detach().float().clone() for parameter in parameters]
        self.steps = 0

    def after_step(self, run: Run, step: Step) -> None:
        if not step.was_skipped:
            self.update()

    def weights_for(self, run: Run, purpose: str) -> AbstractContextManager[None]:
        return self.in_place() if purpose in self.purposes else nullcontext()

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after a step of the optimizer to the average."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        now = [parameter.detach().float() for parameter in self.parameters]
        get_ema_multi_avg_fn(decay)(self.average, now, self.steps)
        self.steps += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the network has the average as weights; afterwards it has its own, bit for bit."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._put(self.average)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: Sequence[torch.Tensor]) -> None:
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.copy_(weight)

    def state_dict(self) -> StateDict:
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: StateDict) -> None:
        """Raises ValueError for the state of another network."""
        if [average.shape for average in state["average"]] != [average.shape for average in self.average]:
            raise ValueError("its tensors have other shapes")
        self.steps = state["steps"]
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)
