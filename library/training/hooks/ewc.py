"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796): weights that earlier images need stay where
they were at the start of the run.

penalty = lambda / 2 · Σ F_i (w_i - w*_i)², with w* the weights at the start and F_i the diagonal of the empirical
Fisher information there: the mean over earlier images of the squared gradient of one image's loss. Its gradient,
lambda · F_i (w_i - w*_i), is added to the loss's: so the reported losses are those of a run without it.

Why lambda is computed. The penalty is to be the rise of the earlier images' loss, so lambda F should be its Hessian H.
A loss L that is the mean of N squared residuals r has, by the Gauss-Newton approximation, H_i = 2/N Σ (∂r/∂w_i)². Its
gradient is 2/N Σ r ∂r/∂w_i, and the square of that on average 4/N² · L · Σ (∂r/∂w_i)², if the residuals are independent
and of equal size. So H = N / (2 L) · F.

The diagonal leaves out that the weights of a LoRA move together, so this penalty is too small: lambda is `STRENGTH`
times N / (2 L), which was measured (benchmarks/forgetting.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from accelerate.utils import gather_object
from torch import Tensor

from library import rng
from library.data.dataset import TrainingData
from library.data.plan import PlannedBatch
from library.out_of_memory import during
from library.progress import bar
from library.training.divergence import is_finite
from library.training.hook import Hook, StateDict, Step
from library.training.run import Run
from library.training.step import Objective, batch_loss

logger = logging.getLogger(__name__)

DRAWS = 4  # noise levels of each image
STRENGTH = 10  # times N / (2 L)


class Consolidation(Hook[Run]):
    """Two fp32 numbers a trained weight, which the state has, too: a resumed run does not measure again."""

    name = "ewc"

    def __init__(
        self,
        parameters: Sequence[Tensor],
        earlier: Sequence[TrainingData],
        *,
        strength: float | None,
        most_images: int,
    ) -> None:
        """`earlier`: in batches of one image. `strength`: lambda; None computes it."""
        self._parameters, self.earlier = parameters, earlier
        self._strength, self._most_images = strength, most_images
        self.fisher: list[Tensor] = []
        self.anchor: list[Tensor] = []

    def before_training(self, run: Run) -> None:
        if self.fisher:  # of the state
            return
        with during("measuring the Fisher information of --ewc_data", done=run.position.done):
            self.fisher, loss, elements = measure(run, self.earlier, most_images=self._most_images)
        self.anchor = [parameter.detach().float().clone() for parameter in self._parameters]
        chosen = "as given"
        if self._strength is None:
            self._strength = STRENGTH * natural_strength(loss, elements)
            chosen = f"{STRENGTH} · {elements} elements / (2 · loss {loss:.4f})"
        mean = float(sum(one.sum() for one in self.fisher)) / sum(one.numel() for one in self.fisher)
        logger.info("ewc: lambda %.4g (%s), mean Fisher information %.3g", self._strength, chosen, mean)

    @torch.no_grad()
    def after_backward(self, run: Run, step: Step) -> None:
        assert self._strength is not None
        strength = self._strength * (1.0 if run.accelerator.scaler is None else run.accelerator.scaler.get_scale())
        for parameter, fisher, anchor in zip(self._parameters, self.fisher, self.anchor, strict=True):
            pull = strength * fisher * (parameter.float() - anchor)
            if parameter.grad is None:
                parameter.grad = pull.to(parameter)
            else:
                parameter.grad += pull.to(parameter.grad)

    @torch.no_grad()
    def penalty(self) -> float:
        """lambda / 2 · Σ F_i (w_i - w*_i)²."""
        assert self._strength is not None
        parts = [
            (fisher * (parameter.float() - anchor).square()).sum(dtype=torch.float64)
            for parameter, fisher, anchor in zip(self._parameters, self.fisher, self.anchor, strict=True)
        ]
        return self._strength / 2 * float(torch.stack(parts).sum())

    def end(self, run: Run, *, stopped_by: str, conclusion: str) -> None:
        if self.fisher:
            logger.info("ewc: the penalty at the end is %.3g", self.penalty())

    def state_dict(self) -> StateDict:
        return {"strength": self._strength, "fisher": self.fisher, "anchor": self.anchor}

    def load_state_dict(self, state: StateDict) -> None:
        """Raises ValueError for the state of another network."""
        for name in ("fisher", "anchor"):
            if [one.shape for one in state[name]] != [one.shape for one in self._parameters]:
                raise ValueError(f"its {name} has other shapes")
            found = zip(state[name], self._parameters, strict=True)
            setattr(self, name, [one.to(parameter.device, torch.float32) for one, parameter in found])
        if self._strength is None:
            self._strength = float(state["strength"])


def natural_strength(loss: float, elements: int) -> float:
    """N / (2 L): see this file's head."""
    return elements / (2 * max(loss, torch.finfo(torch.float32).tiny))


def measure(run: Run, earlier: Sequence[TrainingData], *, most_images: int) -> tuple[list[Tensor], float, int]:
    """(Fisher information of each parameter, fp32; the images' mean loss; the latents' elements of an image), the same
    on every process. The network has no gradients afterwards."""
    objective = replace(run.objective, more=())
    device, scaler = run.accelerator.device, run.accelerator.scaler
    scale = 1.0 if scaler is None else scaler.get_scale()
    fisher = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in run.parameters]
    total, elements, planned = 0.0, 0, _planned(earlier, most_images)
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    with rng.without_dropout(run.network):
        for number in bar(range(rank, math.ceil(len(planned) / world) * world, world), desc="ewc", disable=rank > 0):
            # under FSDP all processes run the model equally often: one without an image repeats the last
            data, image = planned[min(number, len(planned) - 1)]
            for epoch in range(DRAWS):
                loss, size = _gradient(run, objective, data, image, epoch, scale=scale)
                while scale > 1 and not _are_finite(run):  # fp16: scaled too far
                    scale /= 2
                    run.optimizer.zero_grad(set_to_none=True)
                    loss, size = _gradient(run, objective, data, image, epoch, scale=scale)
                if number < len(planned):
                    total, elements = total + loss, elements + size
                    for mean, parameter in zip(fisher, run.parameters, strict=True):
                        if parameter.grad is not None:
                            mean += (parameter.grad.float() / scale).square()
                run.optimizer.zero_grad(set_to_none=True)
    count = len(planned) * DRAWS
    sums = torch.tensor([total, float(elements)], dtype=torch.float64, device=device)
    if world > 1:
        sums = run.accelerator.reduce(sums, reduction="sum")
        fisher = [run.accelerator.reduce(one, reduction="sum") for one in fisher]
    return [one / count for one in fisher], float(sums[0]) / count, round(float(sums[1]) / count)


def _are_finite(run: Run) -> bool:
    """Whether the gradients of all processes are finite."""
    broken = not is_finite(parameter.grad for parameter in run.parameters if parameter.grad is not None)
    return not any(gather_object([broken]) if run.accelerator.num_processes > 1 else [broken])


def _planned(earlier: Sequence[TrainingData], most_images: int) -> list[tuple[TrainingData, PlannedBatch]]:
    """Batches of one image, as many of each set as of the others if there are more than `most_images`."""
    plans = [[(data, batch) for batch in data.plan(0)] for data in earlier]
    by_turns = [one for turn in zip_longest(*plans) for one in turn if one is not None]
    return by_turns[:most_images]


def _gradient(
    run: Run, objective: Objective, data: TrainingData, image: PlannedBatch, epoch: int, *, scale: float
) -> tuple[float, int]:
    """Give the parameters the gradient of an image's loss, times `scale`. Returns the loss, and the elements of the
    image's latents."""
    batch = next(data.batches([image], epoch=epoch, loader=run.loader))
    assert batch.moments is not None, "the latents are cached"
    with run.accelerator.autocast():
        device = run.accelerator.device
        found = batch_loss(batch, run.family, objective, seed=data.seed, device=device, train_text=run.train_text)
    (found.loss * scale).backward()
    return found.loss.item(), batch.moments[0].numel()
