"""The training loop: batch → loss → backward → clip → step → report → save."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from library import rng
from library.data.plan import of_rank, split_into_steps
from library.errors import CommonError
from library.optimizers.create import effective_rates
from library.optimizers.small_lora import has_modes
from library.out_of_memory import OutOfMemory, during
from library.progress import progress
from library.record import trackers
from library.training import divergence
from library.training.divergence import Diverged
from library.training.hook import Step
from library.training.run import Run
from library.training.step import BatchLoss, refuse_broken_latents
from library.training.stop import StopRequest

if TYPE_CHECKING:
    from tqdm import tqdm

    from library.data.dataset import Batch


@dataclass(frozen=True)
class StepBatches:
    """The batches of one optimizer step on this process.

    `batches`: one per micro-step, None where this process has nothing to do (the end of an epoch). `count`: the
    batches of the step over all processes and micro-steps, which the loss is averaged over.
    """

    step: int  # counted from 1 over the whole run
    epoch: int  # counted from 0
    batches: list[Batch | None]
    count: int


def train(run: Run) -> signal.Signals | None:
    """Train to the end, or an early one (None), or until Ctrl-C, SIGTERM or SIGHUP, after the running step.

    CommonError if the run diverges and may not continue, `OutOfMemory` if a part of it needs more memory than there is;
    the run as it was before the failed step is then saved.
    """
    quiet, position = not run.accelerator.is_main_process, run.position
    with (
        StopRequest() as stop,
        progress(total=position.total, initial=position.done, desc="steps", unit="step", disable=quiet) as bar,
    ):
        if position.done == 0:
            _from_training(run)
        for hook in run.hooks:
            hook.before_training(run)
        while True:
            try:
                return _train(run, stop, bar)
            except Diverged as problem:
                if not any(hook.put_back(run, problem) for hook in run.hooks):
                    for hook in run.hooks:
                        hook.diverged(run, problem.step, str(problem))
                    raise CommonError(f"{problem}. {_end(run, problem.step)}. {problem.advice}") from None
                for hook in run.hooks:
                    hook.rolled_back(run, position.done, str(problem))
                bar.n = position.done
                bar.refresh()
            except OutOfMemory as problem:
                problem.kept = _kept(run, problem)
                raise


def _train(run: Run, stop: StopRequest, bar: tqdm) -> signal.Signals | None:
    """Run steps to the end, or until a request to stop."""
    epoch = -1
    _to_training(run)
    for item in step_batches(run):
        if item.epoch != epoch:
            epoch = item.epoch
            start_epoch(run, epoch)
        step = _step_or_skip(run, item)
        run.losses.add(step.loss)
        _report(run, step, bar)
        _from_training(run)
        ends = _end_step(run, step)
        if ends:
            return None
        signum = stop.of_any(run.accelerator)
        if signum and step.number < run.position.total:
            for hook in run.hooks:
                hook.save_now(run, step.number)
            return signum
        _to_training(run)
    _from_training(run)
    return None


def _end_step(run: Run, step: Step) -> bool:
    """Let the hooks validate, save and render. Returns whether training ends with this step."""
    ends = False
    with during(f"the end of step {step.number}", done=step.number):
        for hook in run.hooks:
            ends = hook.end_of_step(run, step) or ends
        for hook in run.hooks:
            hook.save(run, step.number, last=ends)
    return ends


def step_batches(run: Run) -> Iterator[StepBatches]:
    """The remaining steps of the run, in order, with this process's batches."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    total, step = run.position.total, 0
    for epoch in itertools.count():
        steps = split_into_steps(run.data.plan(epoch), world_size=world, accumulation=run.accumulation)
        done = min(run.position.done - min(step, run.position.done), len(steps))
        steps_left = steps[done : total - step]
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
        if step == total:
            return


def start_epoch(run: Run, epoch: int) -> None:
    run.network.start_epoch()
    for hook in run.hooks:
        hook.start_epoch(run, epoch)


def optimizer_step(run: Run, item: StepBatches) -> Step:
    """One optimizer step over all processes; its loss is the mean of its batches, before the step.

    `Diverged` if that loss or its gradient is not finite: the weights are then unchanged. `OutOfMemory` if it needs
    more memory than there is.
    """
    step = Step(item.step, item.epoch)
    with during(f"step {step.number}", done=step.number - 1):
        step.loss, step.gradient_norm = _gradients(run, item, step)
        for hook in run.hooks:
            hook.before_step(run, step)
    with during(f"the optimizer in step {step.number}", done=step.number - 1, is_whole=False):
        run.optimizer.step()
        step.rates = effective_rates(run.optimizer.optimizer)  # before a schedule sets the next step's
        step.was_skipped = run.optimizer.step_was_skipped
        if not step.was_skipped:
            run.network.after_step(step.number, run.position.total)
    run.optimizer.zero_grad(set_to_none=True)
    with during(f"step {step.number}", done=step.number):
        for hook in run.hooks:
            hook.after_step(run, step)
    return step


def _step_or_skip(run: Run, item: StepBatches) -> Step:
    """The step; if it diverged and a hook has skipped it, one without effect, with the loss NaN."""
    try:
        return optimizer_step(run, item)
    except Diverged as problem:
        if not any(hook.skip(run, problem) for hook in run.hooks):
            raise
        for hook in run.hooks:
            hook.diverged(run, item.step, str(problem))
        return Step(item.step, item.epoch, rates=effective_rates(run.optimizer.optimizer))


def _gradients(run: Run, item: StepBatches, step: Step) -> tuple[float, float]:
    """Compute the gradients of a step, averaged and clipped. Returns the loss, and their norm before clipping."""
    accelerator = run.accelerator
    # Processes average their gradients below, so each weights its batches by the number of processes.
    losses = _backward_all(run, item, weight=accelerator.num_processes / item.count)
    total = torch.stack(losses).sum() if losses else torch.zeros((), device=accelerator.device)
    run.gradients.average()
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, reduction="mean")
    for hook in run.hooks:
        hook.after_backward(run, step)
    # The only point of a step where the host waits for the device; all work so far has been queued.
    loss, norm = torch.stack((total.float(), run.gradients.clip().to(total.device).float())).tolist()
    if not math.isfinite(loss) or not (math.isfinite(norm) or _only_scaled_too_far(run)):
        if (scaler := accelerator.scaler) is not None:
            scaler.update(scaler.get_scale())  # the step ends here: the next one's gradients can be unscaled
        raise _diverged(run, item, losses)
    return loss, norm


def _backward_all(run: Run, item: StepBatches, *, weight: float) -> list[torch.Tensor]:
    """Compute the gradients of this process's batches of a step. Returns their weighted losses."""
    losses = []
    for batch in item.batches:
        if batch is None:
            if run.dummy is not None:
                backward(run, run.dummy, weight=0.0)
            continue
        run.network.before_batch()
        for hook in run.hooks:
            hook.before_batch(run, batch)
        losses.append(backward(run, batch, weight=weight))
    return losses


def backward(run: Run, batch: Batch, *, weight: float) -> torch.Tensor:
    """Add the gradients of one batch's loss, times `weight`, to the accumulated ones; returns that loss, detached.

    The weight is 0 for a dummy batch.
    """
    # Dropout draws from torch's global generators: seeded by a key here, they do not depend on earlier draws.
    first = batch.samples[0]
    torch.manual_seed(rng.key_of(run.seed, first.epoch, first.repeat, first.sample.key, "dropout") >> 1)
    found = loss_of(run, batch, train_text=run.train_text)
    if weight:
        for hook in run.hooks:
            hook.after_batch(run, batch, found)
    penalty = run.network.penalty()  # not part of the reported loss, which other kinds' can be compared with
    run.gradients.backward((found.loss if penalty is None else found.loss + penalty) * weight)
    return found.loss.detach() * weight


def loss_of(run: Run, batch: Batch, *, train_text: bool) -> BatchLoss:
    """The loss of one batch, with the current weights."""
    with run.accelerator.autocast():
        return run.batch_loss(
            batch,
            run.family,
            run.objective,
            seed=run.seed,
            device=run.accelerator.device,
            train_text=train_text,
            at_noise=run.network.at_noise,
        )


def _report(run: Run, step: Step, bar: tqdm) -> None:
    """Show a step in the progress bar and log it to the trackers."""
    different = sorted(set(step.rates.values()))
    shown = ",".join(f"{rate:.2e}" for rate in dict.fromkeys(step.rates.values()))
    if len(different) > 4:  # rates by block or layer
        shown = f"{different[0]:.2e}..{different[-1]:.2e}"
    average = run.losses.average
    bar.set_postfix(loss=f"{average:.4f}", lr=shown, refresh=False)
    bar.update()
    values = {"loss/current": step.loss, "loss/average": average, "epoch": step.epoch + 1}
    values |= {f"lr/{name}": rate for name, rate in step.rates.items()}
    for hook in run.hooks:
        values |= hook.report(run, step)
    trackers.tell(run.accelerator, values, step=step.number)


# -- optimizers that average the weights: weights to save differ from weights to train


def _to_training(run: Run) -> None:
    if has_modes(run.optimizer.optimizer):
        run.optimizer.optimizer.train()


def _from_training(run: Run) -> None:
    """Switch to the weights to save. Before a first step both are the same, and some optimizers have no average yet."""
    if has_modes(run.optimizer.optimizer) and run.optimizer.optimizer.state:
        run.optimizer.optimizer.eval()


# -- a step that goes wrong


def _only_scaled_too_far(run: Run) -> bool:
    """Whether a gradient may be infinite because fp16 losses are scaled: the scaler then skips the step and lowers the
    scale. At a scale of 1 it cannot be lowered, and the gradient itself is wrong."""
    return run.accelerator.scaler is not None and run.accelerator.scaler.get_scale() > 1


def _diverged(run: Run, item: StepBatches, losses: list[torch.Tensor]) -> Diverged:
    """The error of a step, from the batches of all processes; every process must call this."""
    batches = [batch for batch in item.batches if batch is not None]
    mine = [
        (float(loss), [str(draw.sample.path) for draw in batch.samples])
        for loss, batch in zip(losses, batches, strict=True)
    ]
    of_all = gather_object(mine) if run.accelerator.num_processes > 1 else mine
    for batch in batches:
        refuse_broken_latents(batch, run.family, run.accelerator.device)
    return divergence.named(item.step, [loss for loss, _ in of_all], [images for _, images in of_all])


def _kept(run: Run, problem: OutOfMemory) -> str:
    """Save what can be saved after this error of memory. Returns a sentence about that."""
    if run.accelerator.num_processes > 1 or problem.done is None:
        return ""  # others would wait in this step, and saving may need them
    run.optimizer.zero_grad(set_to_none=True)
    if not problem.is_whole and problem.done > run.position.done:
        return "It has changed some of the weights, so nothing was written: earlier files are unchanged"
    try:
        return _end(run, problem.done + 1)
    except OutOfMemory:
        return "Nor is there enough to save the run: earlier files are unchanged"


def _end(run: Run, step: int) -> str:
    """Save the run as it was before this failed step. Returns a sentence about that."""
    done = step - 1
    _from_training(run)
    if not divergence.is_finite(run.parameters):
        return "The weights are not finite either, so nothing was written: earlier files are unchanged"
    if done == run.position.done:
        return "Nothing was trained " + (f"since step {done}" if done else "yet") + ", and nothing was written"
    for hook in run.hooks:
        hook.save_now(run, done)
    return f"The run is saved as of step {done}"
