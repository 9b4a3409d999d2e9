"""The training loop: batch → loss → backward → clip → step → report → save."""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from library import rng
from library.data.plan import of_rank, split_into_steps
from library.optimizers.create import effective_rates
from library.progress import progress
from library.training.step import Objective, batch_loss
from networks.protocol import without

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.data.dataset import Batch, TrainingData
    from library.data.loader import PixelLoader
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepBatches:
    """What one optimizer step sees on this process.

    `batches`: one per micro-step, None where this process has nothing to do (the end of an epoch). `count`: the
    batches of the step over all processes and micro-steps, which the loss is averaged over.
    """

    step: int  # counted from 1 over the whole run
    epoch: int  # counted from 0
    batches: list[Batch | None]
    count: int


@dataclass
class Run:
    """All that the loop works on. `build.py` makes it."""

    accelerator: Accelerator
    family: ModelFamily
    network: Any  # a kohya-style network: networks.network.Network, or a third party's
    parameters: list[torch.nn.Parameter]
    optimizer: Any  # accelerate's wrapper of a torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None
    data: TrainingData
    objective: Objective
    loader: PixelLoader
    seed: int
    total_steps: int
    accumulation: int
    train_text: bool
    max_grad_norm: float
    scale_weight_norms: float | None
    schedule_free: bool
    observe: Callable[[float, float | None], None] | None  # the loss and the gradient's norm, before each step
    on_step: Callable[[Any, Any], Any]  # (text_encoder, unet): what a third party's network wants before each batch
    save: Callable[[int], None]  # write what is due after so many steps
    save_now: Callable[[int], object]  # write the network as it is after so many steps
    done: int = 0  # steps that an earlier run made
    losses: list[float] = field(default_factory=list)


def train(run: Run) -> signal.Signals | None:
    """Train to the end (None), or until Ctrl-C or SIGTERM, which lets the running step finish."""
    epoch = -1
    quiet = not run.accelerator.is_main_process
    with (
        _StopRequest() as stop,
        progress(total=run.total_steps, initial=run.done, desc="steps", unit="step", disable=quiet) as bar,
    ):
        _to_training(run)
        for item in step_batches(run):
            if item.epoch != epoch:
                epoch = item.epoch
                run.network.on_epoch_start(None, run.family.unet)
            loss = optimizer_step(run, item)
            run.losses.append(loss)
            _report(run, item, bar)
            _from_training(run)
            run.save(item.step)
            if stop.requested and item.step < run.total_steps:
                run.save_now(item.step)
                return stop.requested
            _to_training(run)
        _from_training(run)
    return None


def step_batches(run: Run) -> Iterator[StepBatches]:
    """The steps of the run that are not done yet, in order, with this process's batches."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    step = 0
    for epoch in itertools.count():
        steps = split_into_steps(run.data.plan(epoch), world_size=world, accumulation=run.accumulation)
        done = min(run.done - min(step, run.done), len(steps))
        steps_left = steps[done : run.total_steps - step]
        step += done
        mine = run.data.batches(of_rank(steps_left, rank), epoch=epoch, loader=run.loader)
        for micro_steps in steps_left:
            step += 1
            yield StepBatches(
                step=step,
                epoch=epoch,
                batches=[next(mine) if micro[rank] is not None else None for micro in micro_steps],
                count=sum(batch is not None for micro in micro_steps for batch in micro),
            )
        if step == run.total_steps:
            return


def optimizer_step(run: Run, item: StepBatches) -> float:
    """One optimizer step over all processes; the mean loss of its batches, before the step."""
    accelerator = run.accelerator
    # Processes average their gradients below, so each weighs its batches as if all were its own.
    weight = accelerator.num_processes / item.count
    total = torch.zeros((), device=accelerator.device)
    for batch in item.batches:
        if batch is None:
            continue
        run.on_step(None, run.family.unet)
        total += backward(run, batch, weight=weight)
    if accelerator.num_processes > 1:
        average_gradients(accelerator, run.parameters)
        total = accelerator.reduce(total, reduction="mean")
    norm = None
    if run.max_grad_norm:
        norm = accelerator.clip_grad_norm_(run.parameters, run.max_grad_norm)
    if run.observe is not None:
        run.observe(float(total), None if norm is None else float(norm))
    run.optimizer.step()
    if run.schedule is not None and not run.optimizer.step_was_skipped:
        run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.scale_weight_norms:
        run.network.apply_max_norm_regularization(run.scale_weight_norms, accelerator.device)
    return float(total)


def backward(run: Run, batch: Batch, *, weight: float) -> torch.Tensor:
    """Add the gradients of one batch's loss, times `weight`, to those that are there; returns that loss, detached."""
    # Dropout draws from torch's global generators: keyed here, they do not depend on what was drawn before.
    first = batch.samples[0]
    torch.manual_seed(rng.key_of(run.seed, first.epoch, first.repeat, first.sample.key, "dropout") >> 1)
    device = run.accelerator.device
    with run.accelerator.autocast():
        loss = batch_loss(
            batch,
            run.family,
            run.objective,
            seed=run.seed,
            device=device,
            train_text=run.train_text,
            without=partial(without, run.network),
        )
    run.accelerator.backward(loss * weight)
    return loss.detach() * weight


def average_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, in one message. A missing gradient counts as zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = accelerator.reduce(torch.cat([g.reshape(-1).float() for g in gradients]), reduction="mean")
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _report(run: Run, item: StepBatches, bar: Any) -> None:
    rates = effective_rates(run.optimizer.optimizer)
    recent = run.losses[-100:]
    average = sum(recent) / len(recent)
    different = sorted(set(rates.values()))
    shown = ",".join(f"{rate:.2e}" for rate in dict.fromkeys(rates.values()))
    if len(different) > 4:  # rates by block or layer
        shown = f"{different[0]:.2e}..{different[-1]:.2e}"
    bar.set_postfix(loss=f"{average:.4f}", lr=shown, refresh=False)
    bar.update()
    if run.accelerator.trackers:
        values = {"loss/current": run.losses[-1], "loss/average": average, "epoch": item.epoch + 1}
        run.accelerator.log(values | {f"lr/{name}": rate for name, rate in rates.items()}, step=item.step)


def _to_training(run: Run) -> None:
    if run.schedule_free:
        run.optimizer.optimizer.train()


def _from_training(run: Run) -> None:
    """Schedule-free optimizers keep the weights to save apart from those to train."""
    if run.schedule_free:
        run.optimizer.optimizer.eval()


class _StopRequest(contextlib.AbstractContextManager["_StopRequest"]):
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the running step; a second one stops at once."""

    requested: signal.Signals | None = None

    def __enter__(self) -> _StopRequest:
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, signum: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(signum)
        logger.warning("stopping after this step; Ctrl-C again to stop at once, without saving")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
