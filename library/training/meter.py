"""Measures a step: its update, the weights, each adapter's delta, and the loss by noise level.

The measurements are queued on the device and fetched together, at the measured steps; other steps only add their
samples' losses to the sums by noise level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.diffusion.process import BINS, Process
from library.gpu import to_device
from library.training.hook import StateDict

if TYPE_CHECKING:
    from accelerate import Accelerator

    from networks.network import TrainableNetwork


@dataclass(frozen=True)
class Measured:
    """The measurements of one step. `loss_by_timestep`: by range of noise levels, the mean over the samples since the
    last measured step, None if there were none. `delta_norms`: Frobenius norm of each adapter's delta; empty if
    unknown."""

    update_ratio: float  # |change of the weights| / |weights|
    weight_norm: float
    moved: dict[str, float]  # share of the weights that the step changed, by group of parameters
    loss_by_timestep: list[float | None]
    delta_norms: list[float]


class Meter:
    """Call `batch` for each batch, then `take_in` or `forget`; and `before` and `after` around the optimizer's step.

    The sums by noise level are over all processes, so that a run's state has them, whichever process writes it.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Parameter]],
        network: TrainableNetwork,
        accelerator: Accelerator,
        *,
        process: Process,
    ) -> None:
        """`groups`: the trained parameters by the names of their groups. `process`: the bins divide its levels."""
        self._parameters: list[Tensor] = [parameter for group in groups.values() for parameter in group]
        self._members = {name: len(group) for name, group in groups.items()}
        self._sizes = {name: sum(parameter.numel() for parameter in group) for name, group in groups.items()}
        self._network, self._accelerator, self._process = network, accelerator, process
        self._before: list[Tensor] | None = None
        self._bins = torch.zeros(2, BINS, device=accelerator.device)  # sums, counts
        self._new = torch.zeros_like(self._bins)  # of the running step, of this process

    def batch(self, per_sample_B: Tensor, level_B: Tensor) -> None:
        """The losses of a batch, detached, with their noise levels, which lie on the CPU."""
        places = to_device(self._process.bin_of(level_B, BINS), self._bins.device)
        losses = per_sample_B.to(self._bins)
        counted = losses.isfinite()
        self._new.index_add_(1, places, torch.stack((losses.nan_to_num(0, 0, 0), counted.to(losses))))

    def take_in(self) -> None:
        """Add the batches of this step to the sums. All processes must call it at the same steps."""
        new = self._new
        if self._accelerator.num_processes > 1:
            new = self._accelerator.reduce(new, reduction="sum")
        self._bins = self._bins + new
        self.forget()

    def forget(self) -> None:
        """Drop the batches of this step, which is skipped."""
        self._new = torch.zeros_like(self._new)

    @torch.no_grad()
    def before(self) -> None:
        """Remember the weights."""
        if self._before is None:  # the buffer is reused: allocating new memory costs more than the copy
            self._before = [torch.empty_like(parameter, requires_grad=False) for parameter in self._parameters]
        torch._foreach_copy_(self._before, self._parameters)

    @torch.no_grad()
    def after(self) -> Measured:
        """The measurements of the step since `before`."""
        assert self._before is not None, "before() comes first"
        torch._foreach_sub_(self._before, self._parameters)
        parts = [
            torch.stack([_norm(self._before), _norm(self._parameters)]),
            self._bins.flatten(),
            self._changed(self._before),
            *([] if (norms := self._network.norms()) is None else [norms]),
        ]
        self._bins = torch.zeros_like(self._bins)
        numbers: list[float] = torch.cat(parts).tolist()  # the only point where the host waits for the device
        update, weights = numbers[:2]
        sums, counts = numbers[2 : 2 + BINS], numbers[2 + BINS : 2 + 2 * BINS]
        changed, delta_norms = numbers[2 + 2 * BINS :][: len(self._sizes)], numbers[2 + 2 * BINS + len(self._sizes) :]
        return Measured(
            update_ratio=update / weights if weights else 0.0,
            weight_norm=weights,
            moved={name: count / self._sizes[name] for name, count in zip(self._sizes, changed, strict=True)},
            loss_by_timestep=[total / count if count else None for total, count in zip(sums, counts, strict=True)],
            delta_norms=delta_norms,
        )

    def _changed(self, differences: Sequence[Tensor]) -> Tensor:
        """The number of changed weights of each group, [groups]."""
        counts = torch.stack([torch.count_nonzero(difference) for difference in differences])
        return torch.stack([part.sum() for part in counts.split(list(self._members.values()))]).float()

    def state_dict(self) -> StateDict:
        """The sums of the steps since the last measured one."""
        return {"loss_by_timestep": self._bins}

    def load_state_dict(self, state: StateDict) -> None:
        """Raises ValueError for a state of another form."""
        if state["loss_by_timestep"].shape != self._bins.shape:
            raise ValueError(f"its losses by timestep have the shape {list(state['loss_by_timestep'].shape)}")
        self._bins = state["loss_by_timestep"].to(self._bins)
        self.forget()


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all numbers together, fp32."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), 2, torch.float32)))
