"""Curves for TensorBoard and Weights & Biases."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError, why_not

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrackerPlan:
    """The trackers of a run. `settings`: arguments of each tracker, from the file `settings_file`.

    `folder` is this run's, in `logging_dir`. `config`: options to log with the curves; None: none.
    """

    names: tuple[str, ...]  # "tensorboard", "wandb"
    project: str
    logging_dir: str | None
    folder: str | None
    settings_file: str | None
    settings: dict[str, dict[str, object]]
    config: dict[str, bool | int | float | str] | None
    wandb_key: str | None = dataclasses.field(default=None, repr=False)


def start(accelerator: Accelerator, plan: TrackerPlan) -> None:
    """Begin the logs. `UserError` if a tracker refuses its settings, or cannot write."""
    if not plan.names:
        return
    settings = {name: dict(own) for name, own in plan.settings.items()}
    failures: tuple[type[Exception], ...] = (TypeError, ValueError)
    if "wandb" in plan.names and accelerator.is_main_process:
        import wandb

        failures += (wandb.Error,)
        if plan.folder is not None:
            Path(plan.folder).mkdir(parents=True, exist_ok=True)
            settings["wandb"].setdefault("dir", plan.folder)
    try:
        if "wandb" in plan.names and plan.wandb_key is not None and accelerator.is_main_process:
            wandb.login(key=plan.wandb_key)
        accelerator.init_trackers(plan.project, config=plan.config, init_kwargs=settings)
    except failures as error:
        where = f"--log_tracker_config {plan.settings_file}" if plan.settings_file else "--log_with"
        raise UserError(f"{where}: the tracker does not start: {error}") from error
    except OSError as error:
        reason = why_not(error, verb="write to")
        raise UserError(f"--logging_dir {plan.logging_dir}: no logs can be written there: {reason}") from error


def tell(accelerator: Accelerator, values: dict[str, float], *, step: int) -> None:
    """Log numbers to the trackers. If one cannot write, because the disk is full, its logs end; the run continues."""
    if not accelerator.trackers:
        return
    try:
        accelerator.log(values, step=step)
    except OSError as error:
        accelerator.trackers.clear()
        logger.warning("the logs end before step %d, training continues: %s", step, why_not(error, verb="write to"))


def end(accelerator: Accelerator) -> None:
    """Close the logs."""
    try:
        for tracker in accelerator.trackers:
            tracker.finish()
    except OSError as error:
        logger.warning("the end of the logs could not be written: %s", why_not(error, verb="write to"))


def log_image(accelerator: Accelerator, name: str, image: Any, *, caption: str, step: int) -> None:
    """Log an image, if Weights & Biases is used, as kohya does."""
    if any(tracker.name == "wandb" for tracker in accelerator.trackers):
        import wandb

        accelerator.get_tracker("wandb").log({name: wandb.Image(image, caption=caption)}, step=step)
