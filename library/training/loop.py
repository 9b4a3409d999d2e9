"""The training loop: batch → loss → backward → clip → step → report → save."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from library import gpu, rng
from library.data.plan import of_rank, split_into_steps
from library.errors import CommonError, UserError
from library.optimizers.create import effective_rates
from library.optimizers.small_lora import has_modes
from library.progress import progress
from library.record import trackers
from library.record.loss_history import LossHistory
from library.training.hooks import guard as divergence
from library.training.step import BatchLoss, Objective, batch_loss, refuse_broken_latents
from library.training.unwatched import Unwatched
from networks.network import TrainableNetwork

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.data.dataset import Batch, TrainingData
    from library.data.loader import PixelLoader
    from library.models.family import ModelFamily
    from library.parallel.zero import ZeroTwo
    from library.record.validation_history import History
    from library.training.hooks.ema import Ema
    from library.training.hooks.monitor import Monitor
    from library.training.meter import Meter

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
    network: TrainableNetwork
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
    observe: Callable[[float, float | None, float | None], None] | None
    """Told the loss, the gradient's norm and, if it is new, the validation loss, before each step."""
    save: Callable[[int], None]  # write what is due after so many steps
    save_now: Callable[[int], object]  # write the network as it is after so many steps
    guard: divergence.Guard  # what to do about a loss that is no number
    done: int = 0  # steps that an earlier run made
    rates: dict[str, float] = field(default_factory=dict)  # in effect in the last step, by group of parameters
    losses: LossHistory = field(default_factory=LossHistory)
    meter: Meter | None = None  # measures what the monitor tells
    monitor: Monitor | Unwatched = field(default_factory=Unwatched)  # measures and tells what each step did
    save_best: Callable[[int], object] = lambda step: None  # write the network as the best so far
    save_last: Callable[[int], object] = lambda step: None  # write what is due, and the last file, for an early end
    validate: Callable[[int], bool] = lambda step: False  # if it is due after so many steps; True: end the run here
    history: History | None = None  # of the validations
    ema: Ema | None = None
    spare: Batch | None = None  # to be run for nothing where the others run theirs, if anything is shared out
    zero: ZeroTwo | None = None  # the optimizer, if its state is shared out: goes backward and clips too


def train(run: Run) -> signal.Signals | None:
    """Train to the end (None), also an early one, or until Ctrl-C, SIGTERM or SIGHUP, after the step that is running.

    CommonError if the run diverges and may not go on, UserError if the GPU's memory is too small; what it was before
    that step is saved then.
    """
    quiet = not run.accelerator.is_main_process
    with (
        _StopRequest() as stop,
        progress(total=run.total_steps, initial=run.done, desc="steps", unit="step", disable=quiet) as bar,
    ):
        if run.done == 0:
            _from_training(run)
            run.validate(0)
        run.guard.keep(run, run.done)
        while True:
            try:
                return _train(run, stop, bar)
            except divergence.Diverged as problem:
                if not run.guard.roll_back(run, problem):
                    run.monitor.diverged(problem.step, str(problem))
                    raise CommonError(f"{problem}. {_end(run, problem.step)}. {run.guard.ending()}") from None
                run.monitor.go_back(run.done, why=str(problem))
                bar.n = run.done
                bar.refresh()
            except _OutOfMemory as problem:
                kept = ""
                if run.accelerator.num_processes == 1:  # else the others wait in this step, and saving may need them
                    run.optimizer.zero_grad(set_to_none=True)
                    kept = f"{_end(run, problem.step)}. "
                raise UserError(f"{problem}. {kept}{gpu.LESS_MEMORY}") from None


def _train(run: Run, stop: _StopRequest, bar: Any) -> signal.Signals | None:
    """Steps to the end, or to a request to stop."""
    epoch = -1
    _to_training(run)
    for item in step_batches(run):
        if item.epoch != epoch:
            epoch = item.epoch
            run.network.start_epoch()
        try:
            run.losses.add(optimizer_step(run, item))
            if run.ema is not None and not run.optimizer.step_was_skipped:
                run.ema.update()
        except divergence.Diverged as problem:
            if not run.guard.skip(run, problem):
                raise
            run.losses.add(math.nan)
            run.rates = effective_rates(run.optimizer.optimizer)
            run.monitor.diverged(item.step, str(problem))
        _report(run, item, bar)
        _from_training(run)
        if run.validate(item.step):
            run.save_last(item.step)
            return None
        run.save(item.step)
        if run.guard.keeps_after(item.step):
            run.guard.keep(run, item.step)
        signum = stop.of_any(run.accelerator)
        if signum and item.step < run.total_steps:
            run.save_now(item.step)
            return signum
        _to_training(run)
    _from_training(run)
    return None


class _OutOfMemory(Exception):
    """A step needs more memory than the GPU has. The weights are as they were before it."""

    def __init__(self, step: int, error: BaseException) -> None:
        super().__init__(f"step {step}: the GPU's memory is too small: {gpu.memory_of(error)}")
        self.step = step


def _end(run: Run, step: int) -> str:
    """Save the run as it was before this step, which went wrong; a sentence about that."""
    done = step - 1
    _from_training(run)
    if not divergence.is_finite(run.parameters):
        return "The weights are no finite numbers either, so nothing was written: earlier files are as they were"
    if done == run.done:
        return "Nothing was trained " + (f"since step {done}" if done else "yet") + ", and nothing is written"
    run.save_now(done)
    return f"What was trained until step {done} is saved"


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
    """One optimizer step over all processes; the mean loss of its batches, before the step.

    `Diverged` if that loss or its gradient is no finite number, `_OutOfMemory` if the GPU has too little: nothing has
    been changed then.
    """
    accelerator = run.accelerator
    # Processes average their gradients below, so each weighs its batches as if all were its own.
    weight = accelerator.num_processes / item.count
    try:
        losses = _backward_all(run, item, weight=weight)
    except torch.OutOfMemoryError as error:
        raise _OutOfMemory(item.step, error) from None
    total = torch.stack(losses).sum() if losses else torch.zeros((), device=accelerator.device)
    if accelerator.num_processes > 1:
        if run.zero is None:
            average_gradients(accelerator, run.parameters)
        total = accelerator.reduce(total, reduction="mean")
    # The one time in a step that the host waits for the device, which has been given all of the step until here.
    loss, norm = torch.stack((total.float(), clip_gradients(run).to(total.device).float())).tolist()
    if not math.isfinite(loss) or not (math.isfinite(norm) or _only_scaled_too_far(run)):
        raise _diverged(run, item, losses)
    if run.observe is not None and math.isfinite(norm):
        run.observe(loss, norm, None if run.history is None else run.history.loss_after(item.step - 1))
    run.monitor.before_step(item.step, gradient_norm=norm)
    run.optimizer.step()
    run.rates = effective_rates(run.optimizer.optimizer)  # before the schedule goes on to the next step's
    if run.schedule is not None and not run.optimizer.step_was_skipped:
        run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.scale_weight_norms:
        run.network.limit_norms(run.scale_weight_norms)
    run.monitor.after_step(item.step)
    return loss


def _backward_all(run: Run, item: StepBatches, *, weight: float) -> list[torch.Tensor]:
    """The gradients of all batches that this process has in a step; their weighted losses."""
    losses = []
    for batch in item.batches:
        if batch is None:
            if run.spare is not None:
                backward(run, run.spare, weight=0.0)
            continue
        run.network.before_batch()
        losses.append(backward(run, batch, weight=weight))
    return losses


def clip_gradients(run: Run) -> torch.Tensor:
    """Clip to --max_grad_norm, if there is one; the norm of all gradients before that, a 0-d tensor."""
    if run.zero is not None:
        return torch.tensor(run.zero.norm())  # its step clips
    if run.max_grad_norm:
        return run.accelerator.clip_grad_norm_(run.parameters, run.max_grad_norm)
    run.accelerator.unscale_gradients(run.optimizer)
    gradients = [parameter.grad for parameter in run.parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _only_scaled_too_far(run: Run) -> bool:
    """Whether a gradient may be infinite because fp16 losses are scaled: the scaler then leaves out the step, and
    scales less from there on. At a scale of 1 there is nothing to lower, and the gradient itself is wrong."""
    return run.accelerator.scaler is not None and run.accelerator.scaler.get_scale() > 1


def _diverged(run: Run, item: StepBatches, losses: list[torch.Tensor]) -> divergence.Diverged:
    """What went wrong, with the batches of all processes: every one of them comes here."""
    batches = [batch for batch in item.batches if batch is not None]
    mine = [
        (float(loss), [str(draw.sample.path) for draw in batch.samples])
        for loss, batch in zip(losses, batches, strict=True)
    ]
    of_all = gather_object(mine) if run.accelerator.num_processes > 1 else mine
    for batch in batches:
        refuse_broken_latents(batch, run.family, run.accelerator.device)
    return divergence.named(item.step, [loss for loss, _ in of_all], [images for _, images in of_all])


def backward(run: Run, batch: Batch, *, weight: float) -> torch.Tensor:
    """Add the gradients of one batch's loss, times `weight`, to those that are there; returns that loss, detached."""
    # Dropout draws from torch's global generators: keyed here, they do not depend on what was drawn before.
    first = batch.samples[0]
    torch.manual_seed(rng.key_of(run.seed, first.epoch, first.repeat, first.sample.key, "dropout") >> 1)
    found = loss_of(run, batch, train_text=run.train_text)
    if weight:  # else it is run for nothing
        run.monitor.batch(found.per_sample.detach(), found.t)
    (run.zero or run.accelerator).backward(found.loss * weight)
    return found.loss.detach() * weight


def loss_of(run: Run, batch: Batch, *, train_text: bool) -> BatchLoss:
    """The loss of one batch, with the network as it stands."""
    with run.accelerator.autocast():
        return batch_loss(
            batch,
            run.family,
            run.objective,
            seed=run.seed,
            device=run.accelerator.device,
            train_text=train_text,
        )


def average_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, in one message. A missing gradient counts as zero, but
    what has none in any of them stays without: the optimizer leaves it alone, as it does with one process."""
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in parameters]
    present = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=accelerator.device)
    *means, presence = accelerator.reduce(torch.cat([*flat, present]), reduction="mean").split(
        [*map(len, flat), len(present)]
    )
    for parameter, mean, found in zip(parameters, means, presence.tolist(), strict=True):
        if found:
            parameter.grad = mean.view_as(parameter).to(parameter)


def _report(run: Run, item: StepBatches, bar: Any) -> None:
    rates, loss, average = run.rates, run.losses.recent[-1], run.losses.average
    different = sorted(set(rates.values()))
    shown = ",".join(f"{rate:.2e}" for rate in dict.fromkeys(rates.values()))
    if len(different) > 4:  # rates by block or layer
        shown = f"{different[0]:.2e}..{different[-1]:.2e}"
    bar.set_postfix(loss=f"{average:.4f}", lr=shown, refresh=False)
    bar.update()
    more = run.monitor.report(item.step, epoch=item.epoch + 1, loss=loss, average=average, rates=rates)
    values = {"loss/current": loss, "loss/average": average, "epoch": item.epoch + 1}
    values |= {f"lr/{name}": rate for name, rate in rates.items()}
    trackers.tell(run.accelerator, values | more, step=item.step)


def _to_training(run: Run) -> None:
    if has_modes(run.optimizer.optimizer):
        run.optimizer.optimizer.train()


def _from_training(run: Run) -> None:
    """Optimizers that average the weights keep those to save apart from those to train. Before a first step they are
    the same, and some have no average to show yet."""
    if has_modes(run.optimizer.optimizer) and run.optimizer.optimizer.state:
        run.optimizer.optimizer.eval()


class _StopRequest(contextlib.AbstractContextManager["_StopRequest"]):
    """Turns Ctrl-C, SIGTERM or SIGHUP into a request to stop after the running step; a second Ctrl-C stops at once.

    SIGHUP comes of a terminal that is closed or a connection that is lost; nohup has it ignored. Many send a signal
    twice: the shell and the terminal, `timeout`, launchers that pass on what the whole group of processes was sent.
    Only a Ctrl-C that comes later than that is the user's second one.
    """

    TWICE = 1.0  # seconds within which two signals are one

    requested: signal.Signals | None = None
    _since = 0.0

    def __enter__(self) -> _StopRequest:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def _request(self, signum: int, frame: Any) -> None:
        if self.requested is None:
            self.requested, self._since = signal.Signals(signum), time.monotonic()
            logger.warning("stopping after this step; Ctrl-C again to stop at once, without saving")
        elif signum == signal.SIGINT and time.monotonic() - self._since > self.TWICE:
            raise KeyboardInterrupt

    def of_any(self, accelerator: Accelerator) -> signal.Signals | None:
        """The request of any process: they stop after the same step, though the signal reaches them at other times."""
        if accelerator.num_processes == 1:
            return self.requested
        numbers = accelerator.gather(torch.tensor([self.requested or 0], device=accelerator.device))
        highest = int(numbers.max())
        return signal.Signals(highest) if highest else None

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
