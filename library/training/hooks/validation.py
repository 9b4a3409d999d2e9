"""Validation during a run: its times, its images, the logging of its losses, and early stopping."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import gather_object
from torch import Tensor

from library import rng
from library.data.dataset import TrainingData
from library.data.plan import PlannedBatch
from library.diffusion.process import Predicted
from library.gpu import kept_random_state
from library.losses.main import MainLoss
from library.out_of_memory import during
from library.progress import bar
from library.record import trackers
from library.record.validation_history import History, Validation
from library.training.fixed_noise import losses_of_batch
from library.training.hook import Hook, StateDict, Step
from library.training.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Times:
    """When to validate: before the first step, after the last, and every n steps or epochs; every epoch if neither is
    given. (kohya's trainer also validates every epoch beside the steps; here that is an option.)"""

    every_n_steps: int | None
    every_n_epochs: int | None
    steps_per_epoch: int
    total_steps: int

    def due(self, step: int) -> tuple[str, ...]:
        """The curves for the validation after `step` steps, "step" and "epoch"; empty if it is not due."""
        by_epoch = self.every_n_epochs or (None if self.every_n_steps else 1)
        epoch, rest = divmod(step, self.steps_per_epoch)
        ends = step in (0, self.total_steps)
        curves = {
            "step": self.every_n_steps is not None and (ends or step % self.every_n_steps == 0),
            "epoch": by_epoch is not None and (ends or (rest == 0 and epoch % by_epoch == 0)),
        }
        return tuple(name for name, due in curves.items() if due)


class Validator(Hook[Run]):
    """Measures the loss on the held-out images, on every process at the same steps."""

    name = "validation"

    def __init__(
        self,
        data: TrainingData,
        history: History,
        times: Times,
        *,
        timesteps: Sequence[int],
        most_batches: int | None,
    ) -> None:
        """`timesteps`: the process's steps at whose noise levels the loss is measured. `most_batches`: None for all."""
        self.data, self.history, self.times = data, history, times
        self.timesteps, self._most_batches = timesteps, most_batches

    def before_training(self, run: Run) -> None:
        if run.position.done == 0:
            self.validate(run, 0)

    def end_of_step(self, run: Run, step: Step) -> bool:
        return self.validate(run, step.number)

    def validate(self, run: Run, step: int) -> bool:
        """Measure, if it is due after `step` steps. Returns whether training should end here."""
        curves = self.times.due(step)
        if not curves:
            return False
        with during(f"validation after step {step}" if step else "validation before training", done=step):
            by_timestep = measure(run, self.data, self.batches(), self.timesteps)
        result = Validation(step, math.fsum(by_timestep.values()) / len(by_timestep), by_timestep)
        best_before = self.history.best
        self.history.validations.append(result)
        self._log(run, result, curves)
        for hook in run.hooks:
            hook.validated(run, result, best=self.history.best is not best_before)
        if not self.history.patience_is_over or step == self.times.total_steps:
            return False
        logger.info(
            "early stopping after step %d: %d validations without improvement",
            step,
            self.history.without_improvement,
        )
        return True

    def batches(self) -> list[PlannedBatch]:
        """The validation batches of all processes, the same each time; they follow from validation's seed."""
        return self.data.plan(0)[: self._most_batches]

    def _log(self, run: Run, now: Validation, curves: Sequence[str]) -> None:
        step, best = now.step, self.history.best
        parts = ", ".join(f"{loss:.4f} at t {t}" for t, loss in now.by_timestep.items())
        known = f"; best {best.loss:.4f} at step {best.step}" if best is not None else ""
        moment = f"after {step} steps" if step else "before training"
        logger.info("validation %s: %.4f (%s)%s", moment, now.loss, parts, known)
        if not math.isfinite(now.loss):
            logger.warning("the validation loss is %s: weights or latents are no longer finite", now.loss)
        values = {f"loss/validation/{curve}_average": now.loss for curve in curves}
        if math.isfinite(recent := run.losses.average):
            gap = now.loss - recent
            values |= {f"loss/validation/{curve}_divergence": gap for curve in curves}
        values |= {f"loss/validation/t{t}": loss for t, loss in now.by_timestep.items()}
        trackers.tell(run.accelerator, values, step=step)

    def state_dict(self) -> StateDict:
        return self.history.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        self.history.load_state_dict(state)


def measure(
    run: Run, data: TrainingData, batches: Sequence[PlannedBatch], timesteps: Sequence[int]
) -> dict[int, float]:
    """The mean loss of all images per timestep, the same on every process. Training is not affected.

    The batches are divided among the processes and do not depend on their number, and the losses of the images are
    added in the same order: so the result does not depend on the number of processes.
    """
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    # The denoiser may be sharded, so all processes must run it equally often: one without a batch repeats the last one.
    each = math.ceil(len(batches) / world)
    mine = [(number, batches[number]) for i in range(each) for number in [min(i * world + rank, len(batches) - 1)]]
    device = run.accelerator.device
    queued: dict[tuple[int, int], Tensor] = {}
    with (
        rng.without_dropout(run.network),
        torch.no_grad(),
        kept_random_state(device),
        run.weights_for("validate"),
        run.accelerator.autocast(),
    ):
        loaded = data.batches([planned for _, planned in mine], epoch=0, loader=run.loader)
        for (number, _), batch in zip(
            mine, bar(loaded, desc="validation", total=len(mine), disable=rank > 0), strict=True
        ):
            loss = partial(_loss, run.objective.main)
            of_batch = losses_of_batch(run.family, batch, timesteps, seed=data.seed, device=device, loss=loss)
            queued |= {(number, t): losses for t, losses in of_batch.items()}
    found = [(place, losses.tolist()) for place, losses in queued.items()]  # read after everything is queued
    gathered = sorted(dict(gather_object(found)).items())
    by_timestep = {t: [loss for (_, at), losses in gathered if at == t for loss in losses] for t in timesteps}
    return {t: math.fsum(losses) / len(losses) for t, losses in by_timestep.items()}


def _loss(main: MainLoss, seen: Predicted, masks: Tensor | None) -> Tensor:
    """The loss of each image as in training, with the weights of the noise levels, so that the two can be compared."""
    losses = main.unweighted(seen, masks)
    weights = main.of_levels(seen.level_B, losses)
    return losses if weights is None else losses * weights
