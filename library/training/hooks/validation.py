"""Validation during a run: when, on what, where the numbers go, and whether they say that it is time to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor

from library.data.dataset import TrainingData
from library.data.plan import PlannedBatch
from library.diffusion.process import Predicted, middles
from library.gpu import kept_random_state, to_device
from library.losses.main import MainLoss
from library.progress import bar
from library.record import trackers
from library.record.metadata import step_of
from library.record.validation_history import History, Validation
from library.training.fixed_noise import image_losses
from library.training.hooks import ema
from library.training.step import condition_of

if TYPE_CHECKING:
    from library.config.options import Options
    from library.run.plan import Plan
    from library.training.loop import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Times:
    """When to validate: before the first step, after the last, and every n steps or epochs; every epoch if neither is
    given. (kohya's trainer goes on validating every epoch beside the steps; that has to be asked for here.)"""

    every_n_steps: int | None
    every_n_epochs: int | None
    steps_per_epoch: int
    total_steps: int

    def due(self, step: int) -> tuple[str, ...]:
        """The curves that the validation after `step` steps belongs to, "step" and "epoch"; none: it is not due."""
        by_epoch = self.every_n_epochs or (None if self.every_n_steps else 1)
        epoch, rest = divmod(step, self.steps_per_epoch)
        ends = step in (0, self.total_steps)
        curves = {
            "step": self.every_n_steps is not None and (ends or step % self.every_n_steps == 0),
            "epoch": by_epoch is not None and (ends or (rest == 0 and epoch % by_epoch == 0)),
        }
        return tuple(name for name, due in curves.items() if due)


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Called with the number of steps done by every process at the same time; True: training should end here.

    `timesteps`: where the loss is measured. `most_batches`: None for all.
    """

    run: Run
    data: TrainingData
    history: History
    times: Times
    timesteps: Sequence[int]
    most_batches: int | None

    def __call__(self, step: int) -> bool:
        curves = self.times.due(step)
        if not curves:
            return False
        by_timestep = measure(self.run, self.data, self.batches(), self.timesteps)
        loss = math.fsum(by_timestep.values()) / len(by_timestep)
        best_before = self.history.best
        self.history.validations.append(Validation(step, loss, by_timestep))
        self._tell(step, curves)
        if self.history.best is not best_before:
            self.run.save_best(step)
        if not self.history.patience_is_over or step == self.times.total_steps:
            return False
        logger.info(
            "early stopping after step %d: %d validations without improvement",
            step,
            self.history.without_improvement,
        )
        return True

    def batches(self) -> list[PlannedBatch]:
        """The same ones each time, of all processes; which they are follows from validation's seed."""
        return self.data.plan(0)[: self.most_batches]

    def _tell(self, step: int, curves: Sequence[str]) -> None:
        now, best = self.history.validations[-1], self.history.best
        parts = ", ".join(f"{loss:.4f} at t {t}" for t, loss in now.by_timestep.items())
        known = f"; best {best.loss:.4f} at step {best.step}" if best is not None else ""
        moment = f"after {step} steps" if step else "before training"
        logger.info("validation %s: %.4f (%s)%s", moment, now.loss, parts, known)
        if not math.isfinite(now.loss):
            logger.warning("the validation loss is %s: the weights or the images give no numbers any more", now.loss)
        values = {f"loss/validation/{curve}_average": now.loss for curve in curves}
        if math.isfinite(recent := self.run.losses.average):
            gap = now.loss - recent
            values |= {f"loss/validation/{curve}_divergence": gap for curve in curves}
        values |= {f"loss/validation/t{t}": loss for t, loss in now.by_timestep.items()}
        trackers.tell(self.run.accelerator, values, step=step)
        self.run.monitor.validation(step, {f"t{t}": loss for t, loss in now.by_timestep.items()}, loss=now.loss)


def data_of(plan: Plan) -> TrainingData | None:
    """The images that are held back, with the seed of validation."""
    prepared, seed = plan.prepared.validation, plan.options.validation.validation_seed
    return None if prepared is None else TrainingData(prepared, seed=plan.seed if seed is None else seed)


def attach(run: Run, data: TrainingData, options: Options, *, steps_per_epoch: int) -> None:
    """Have the run validate on `data`."""
    wanted = options.validation
    run.history = History(patience=wanted.early_stopping_patience, threshold=wanted.early_stopping_threshold)
    run.validate = Validator(
        run=run,
        data=data,
        history=run.history,
        times=Times(
            every_n_steps=wanted.validate_every_n_steps,
            every_n_epochs=wanted.validate_every_n_epochs,
            steps_per_epoch=steps_per_epoch,
            total_steps=run.total_steps,
        ),
        timesteps=middles(*run.objective.steps),
        most_batches=wanted.max_validation_steps,
    )


def go_on_with_best(run: Run, file: Path) -> None:
    """See to it that a resumed run's best file is that of the best validation so far, or say that it is not."""
    best = run.history.best if run.history is not None else None
    if best is None or is_best(best, file):
        return
    if best.step == run.done:
        run.save_best(run.done)
    elif file.exists():
        logger.warning(
            "%s is that of step %s, and the best until the state was step %d (%.4f), of which there is no file: it is "
            "written when validation improves on that",
            *(file, step_of(file), best.step, best.loss),
        )
    else:
        logger.warning(
            "%s is not there, the best so far (%.4f at step %d): it is written when validation improves on that",
            *(file, best.loss, best.step),
        )


def is_best(best: Validation | None, file: Path) -> bool:
    """Whether the file is there and, as far as it says, is of the best validation's step."""
    return best is not None and file.is_file() and step_of(file) in (None, best.step)


def measure(
    run: Run, data: TrainingData, batches: Sequence[PlannedBatch], timesteps: Sequence[int]
) -> dict[int, float]:
    """The mean loss of all images per timestep, the same on every process. Training does not notice.

    The processes share the batches out, which are the same however many there are, and the losses of the images are
    added up in the same order: so the number does not depend on how many processes there are.
    """
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    # All run the denoiser equally often, whose weights may be shared out: who has nothing left repeats the last batch.
    each = math.ceil(len(batches) / world)
    mine = [(number, batches[number]) for i in range(each) for number in [min(i * world + rank, len(batches) - 1)]]
    device = run.accelerator.device
    queued: dict[tuple[int, int], Tensor] = {}
    training = run.network.training
    run.network.eval()  # no dropout
    try:
        with (
            torch.no_grad(),
            kept_random_state(device),
            ema.weights_for(run.ema, "validate"),
            run.accelerator.autocast(),
        ):
            loaded = data.batches([planned for _, planned in mine], epoch=0, loader=run.loader)
            for (number, _), batch in zip(
                mine, bar(loaded, desc="validation", total=len(mine), disable=rank > 0), strict=True
            ):
                assert batch.moments is not None, "validation's latents are always kept"
                latents = to_device(batch.moments[0], device).float()
                condition = condition_of(batch, run.family, device, train_text=False)
                keys = [draw.sample.key for draw in batch.samples]
                loss = partial(_loss, run.objective.main, batch.masks)
                for t in timesteps:
                    losses = image_losses(run.family, latents, condition, t, keys=keys, seed=data.seed, loss=loss)
                    queued[number, t] = losses
    finally:
        run.network.train(training)
    found = [(place, losses.tolist()) for place, losses in queued.items()]  # read once all of it is queued
    gathered = sorted(dict(gather_object(found)).items())
    by_timestep = {t: [loss for (_, at), losses in gathered if at == t for loss in losses] for t in timesteps}
    return {t: math.fsum(losses) / len(losses) for t, losses in by_timestep.items()}


def _loss(main: MainLoss, masks: Tensor | None, seen: Predicted) -> Tensor:
    """What training minimises, per image: its loss and the weights of its noise levels, so that the two compare."""
    losses = main.unweighted(seen, masks)
    weights = main.of_levels(seen.level_B, losses)
    return losses if weights is None else losses * weights
