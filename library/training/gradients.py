"""From the losses of a step to the gradients that its optimizer uses: backward, mean over the processes, clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer


class Gradients(Protocol):
    """Every process calls `average` and `clip` in the same steps. `sharded`: each process has a share of the gradients
    and of the optimizer's state."""

    sharded: bool

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, already weighted, to the accumulated ones."""

    def average(self) -> None:
        """Replace each gradient by its mean over the processes, after all backward passes of the step."""

    def clip(self) -> Tensor:
        """Clip to --max_grad_norm, if it is set. Returns the norm of all gradients before clipping, a 0-d tensor."""
        ...


class WholeGradients:
    """Every process has all gradients."""

    sharded = False

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: AcceleratedOptimizer,
        parameters: Sequence[torch.nn.Parameter],
        *,
        max_norm: float,
    ) -> None:
        """`max_norm`: 0 never clips."""
        self._accelerator, self._optimizer, self._parameters = accelerator, optimizer, parameters
        self._max_norm = max_norm
        if accelerator.scaler is not None:  # makes the scale: this process may have no batch in its first step
            accelerator.scaler.scale(torch.zeros((), device=accelerator.device))

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def average(self) -> None:
        if self._accelerator.num_processes > 1:
            average_gradients(self._accelerator, self._parameters)

    def clip(self) -> Tensor:
        if self._max_norm:
            return self._accelerator.clip_grad_norm_(self._parameters, self._max_norm)
        self._accelerator.unscale_gradients(self._optimizer)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)


def average_gradients(accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, in one message. A missing gradient counts as zero, but
    a parameter without one in any process stays without: the optimizer skips it, as it does with one process."""
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in parameters]
    present = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=accelerator.device)
    *means, presence = accelerator.reduce(torch.cat([*flat, present]), reduction="mean").split(
        [*map(len, flat), len(present)]
    )
    for parameter, mean, found in zip(parameters, means, presence.tolist(), strict=True):
        if found:
            parameter.grad = mean.view_as(parameter).to(parameter)
