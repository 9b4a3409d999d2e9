"""The rate finder: trains while the learning rate grows from step to step, finds where the loss falls and where it
diverges, and restores everything (L. N. Smith 2017, arXiv 1506.01186, section 3.3).

Each step trains as the run would, on its batches in their order. After it the loss is measured on a few fixed batches,
with the same noise and noise levels each time: a single step's own loss depends more on the noise levels drawn than on
learning.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from library.config.options import Options
from library.config.registry import Arguments
from library.data.dataset import Batch
from library.errors import UserError
from library.gpu import kept_random_state, to_device
from library.guidance import lr_curve
from library.optimizers.create import OptimizerChoice
from library.progress import progress
from library.run.plan import Plan
from library.training import loop, snapshot
from library.training.divergence import Diverged
from library.training.hooks.max_norm import MaxNorm
from library.training.run import Position, Run

logger = logging.getLogger(__name__)

MEASURED_IMAGES = 16  # at least so many; fewer only where there are no more
BROKEN = 3.0  # the loss has diverged: this many times the lowest so far
# no training uses the draws of this epoch; a prime, so that no --caption_dropout_every_n_epochs divides it
_EPOCH = 999_983


@dataclass(frozen=True)
class Found:
    """The finder's result. `reference`: the configured rate that the sweep's rates stand for, that of `part`."""

    sweep: lr_curve.Sweep
    suggestion: lr_curve.Suggestion
    part: str
    reference: float


def refuse(choice: OptimizerChoice) -> None:
    """UserError for an optimizer that has no rate to be found, before anything is loaded."""
    reason = ""
    if choice.finds_its_rate:
        reason = "finds its rate itself: leave --learning_rate at 1"
    elif choice.relative_step:
        reason = "derives its rate from the step: --optimizer_args relative_step=False lets you give one"
    elif choice.averages:
        reason = (
            "averages its weights over all steps, so the loss after a step is not the effect of that step: "
            "find the rate with --optimizer_type AdamW, and use that"
        )
    if reason:
        raise UserError(f"--find_lr: {choice.name} {reason}")


def find(plan: Plan, run: Run) -> Found:
    """Try the rates of --find_lr_start … --find_lr_end on a run that is ready to start, and leave it as it was."""
    guidance = plan.options.guidance
    if run.accelerator.num_processes > 1:
        raise UserError("--find_lr: one process is enough, and its result holds for all: start it without a launcher")
    part, reference = _reference(plan.options, plan.family.PARTS["denoiser"].title)
    rates = geometric(guidance.find_lr_start, guidance.find_lr_end, guidance.find_lr_steps)
    tried = sweep(run, reference=reference, rates=rates)
    return Found(tried, lr_curve.suggest(tried), part, reference)


def _reference(options: Options, title: str) -> tuple[str, float]:
    """The part whose rate the finder reports, and its configured rate; the others keep their proportion to it.

    `title`: of the denoiser.
    """
    rates, network = options.optimizer, options.network
    unet = rates.learning_rate if rates.unet_lr is None else rates.unet_lr
    text = rates.text_encoder_lr[0] if rates.text_encoder_lr else rates.learning_rate
    if options.embedding.train_embedding_only:
        own = options.embedding.embedding_lr
        return "the embedding", rates.learning_rate if own is None else own
    if not network.network_train_text_encoder_only and unet > 0:
        return f"the {title}", unet
    assert text > 0, "a run without any rate is refused before"
    return "the text encoder", text


def geometric(start: float, end: float, steps: int) -> list[float]:
    """`steps` rates from `start` to `end`, each the same multiple of the one before."""
    return [start * (end / start) ** (i / (steps - 1)) for i in range(steps)]


def sweep(run: Run, *, reference: float, rates: Sequence[float]) -> lr_curve.Sweep:
    """One step at each of the rates, until the loss is more than `BROKEN` times its lowest or NaN.

    Each group's configured rate is multiplied by rate / `reference`. It runs without hooks, except the max norm, which
    changes the weights of a step. Afterwards weights, optimizer, loss scale and torch's random numbers are as they
    were, bit for bit.
    """
    limits = tuple(hook for hook in run.hooks if isinstance(hook, MaxNorm))
    trial = replace(run, position=Position(total=len(rates)), hooks=limits)
    losses: list[float] = []
    with _undone(trial):
        batches = measured_batches(run)
        before = measure(trial, batches)
        lowest, broken, epoch = before, False, -1
        bar = progress(zip(rates, loop.step_batches(trial), strict=True), desc="rates", total=len(rates), unit="rate")
        for rate, item in bar:
            if item.epoch != epoch:
                epoch = item.epoch
                loop.start_epoch(trial, epoch)
            for group, given in zip(run.optimizer.param_groups, run.groups, strict=True):
                group["lr"] = given["lr"] * rate / reference
            try:
                loop.optimizer_step(trial, item)
                loss = measure(trial, batches)
            except Diverged:
                loss = math.nan
            if math.isfinite(loss):
                losses.append(loss)
                lowest = min(lowest, loss)
            broken = not loss <= BROKEN * lowest  # true for NaN, too
            if broken:
                break
        bar.close()
    return lr_curve.Sweep(list(rates[: len(losses)]), losses, before, broken)


def measured_batches(run: Run) -> list[Batch]:
    """The fixed batches, encoded once."""
    plan = run.data.plan(_EPOCH)
    images = list(itertools.accumulate(map(len, plan)))
    count = next((n for n, seen in enumerate(images, 1) if seen >= MEASURED_IMAGES), len(plan))
    batches = []
    for batch in run.data.batches(plan[:count], epoch=_EPOCH, loader=run.data.loader(workers=0)):
        if batch.pixels is not None:
            with torch.no_grad():
                moments = run.family.encode_images(to_device(batch.pixels, run.accelerator.device))
            batch = replace(batch, pixels=None, moments=moments)
        batches.append(batch)
    return batches


@torch.no_grad()
def measure(run: Run, batches: Sequence[Batch]) -> float:
    """The mean loss over the images of these batches, as in training but without dropout."""
    run.network.eval()
    total = 0.0
    for batch in batches:
        found = loop.loss_of(run, batch, train_text=False)
        total += float(found.loss) * len(batch.samples)
    run.network.train()
    return total / sum(len(batch.samples) for batch in batches)


@contextlib.contextmanager
def _undone(run: Run) -> Iterator[None]:
    """A context after which everything that was trained in it is undone."""
    kept = copy.deepcopy(snapshot.tensors_of(run))
    training = run.network.training
    try:
        with kept_random_state(run.accelerator.device):
            yield
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        snapshot.put(run, kept, "rate finder")
        run.network.train(training)


def report(plan: Plan, run: Run, found: Found) -> None:
    """Write the plot and the numbers to the folder of the LoRA, and print the result with its reason."""
    saves, said = run.saves, found.suggestion
    plot = saves.last_file.with_name(f"{saves.last_file.stem}-find-lr.png")
    numbers = plot.with_suffix(".csv")
    lr_curve.write_numbers(numbers, found.sweep)
    lr_curve.draw(plot, found.sweep, said, label=found.part)
    tried, last = len(found.sweep.rates), found.sweep.rates[-1]
    ended = ", where the loss broke" if found.sweep.broken else ""
    why = "larger steps gain less, and diverge sooner" if said.turned else "and it had not turned when the rates ended"
    lines = [
        f"tried        {tried} rates of {found.part}, from {found.sweep.rates[0]:.1e} to {last:.1e}{ended}",
        f"loss         {found.sweep.before:.4f} before; lowest at {said.lowest_at:.1e}: {said.lowest:.4f} "
        f"({said.fall:.0%} less; smoothed, the same images and noise each time)",
        f"suggestion   {' '.join(rate_options(plan.options, said.rate / found.reference))}",
        *_other_rates(plan.network_arguments, said.rate / found.reference),
        f"why          at {said.rate:.1e} the loss falls fastest: {why}",
        f"             (the other rule, a tenth of the rate at the lowest loss, gives {said.tenth:.1e})",
        f"written      {plot}, {numbers}",
    ]
    for line in lines:
        print(line)
    print("\nRate finder: no LoRA was trained or written.", flush=True)
    if said.fall < lr_curve.LEAST_FALL:
        logger.warning("the loss hardly falls at any rate (%.1f %%): the suggestion is uncertain", 100 * said.fall)
    if not said.turned:
        logger.warning("the loss still falls at the last rate, %.1e: try higher rates, with --find_lr_end", last)


def _other_rates(network_arguments: Arguments, factor: float) -> Iterator[str]:
    """The other options with a rate, which grew in proportion."""
    if network_arguments.get("network_reg_lrs"):
        yield f"             and {factor:.2g} times each rate in network_reg_lrs"


def rate_options(options: Options, factor: float) -> list[str]:
    """The words that set the rates to `factor` times the configured ones."""
    rates, own = options.optimizer, options.embedding.embedding_lr
    words = []
    if own is not None:
        words += ["--embedding_lr", f"{lr_curve.two_digits(own * factor):g}"]
    if options.embedding.train_embedding_only:
        return words or ["--learning_rate", f"{lr_curve.two_digits(rates.learning_rate * factor):g}"]
    if rates.unet_lr is None or rates.text_encoder_lr is None:
        words += ["--learning_rate", f"{lr_curve.two_digits(rates.learning_rate * factor):g}"]
    if rates.unet_lr is not None:
        words += ["--unet_lr", f"{lr_curve.two_digits(rates.unet_lr * factor):g}"]
    if rates.text_encoder_lr is not None:
        words += ["--text_encoder_lr", *(f"{lr_curve.two_digits(rate * factor):g}" for rate in rates.text_encoder_lr)]
    return words
