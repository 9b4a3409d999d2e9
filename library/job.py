"""A whole job: plan, then the contact sheet of the data or advice; or build, then a dry run, the rate finder, or the
training and its pictures."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from library import processes
from library.config.options import Options
from library.config.settings import places_of
from library.errors import CommonError, UserError
from library.run.plan import make_plan

if TYPE_CHECKING:
    from library.run.build import Built

logger = logging.getLogger(__name__)


def run(options: Options, *, family: str | None = None) -> int:
    """Returns the exit code: 0, or 128 and the signal (Ctrl-C: 130) that ended the run early, after saving."""
    with _naming_places(options):
        plan = make_plan(options, only_family=family)
    if (options.run.debug_dataset or options.guidance.recommend) and not processes.is_first():
        return 0  # one sheet is enough, and two would be written to one file
    if options.run.debug_dataset:
        from library.guidance import contact_sheet

        contact_sheet.draw(plan)
        return 0
    if options.guidance.recommend:
        from library.guidance import recommend

        recommend.report(plan)
        return 0
    # torch and all that needs it load only now, when the commonest mistakes are out of the way
    from library.guidance import dry_run, find_lr
    from library.run.build import build
    from library.training import loop
    from library.training.hooks import monitor
    from library.training.hooks.validation import is_best

    with _naming_places(options):
        if options.guidance.find_lr:
            find_lr.refuse(plan.choice)
        built = build(plan)
    if options.run.dry_run:
        dry_run.report(built, measure=options.run.dry_run == "measure")
        return 0
    for line in dry_run.summary(built):
        logger.info("%s", line)
    if options.guidance.find_lr:
        find_lr.report(built, find_lr.find(built))
        return 0
    monitor.attach(built)
    if built.run.done == 0:
        built.samples(0)
    try:
        stopped_by = loop.train(built.run)
    except UserError as error:
        _conclude(built, stopped_by="an error", conclusion="")
        if isinstance(error, CommonError):
            _leave(built, together=True)
        raise
    history = built.run.history
    best_file = built.saves.best_file
    kept = best_file.name if history is not None and is_best(history.best, best_file) else ""
    conclusion = (history and history.conclusion(best_file=kept)) or ""
    if conclusion:
        logger.info("%s", conclusion)
    if built.run.accelerator.is_main_process and stopped_by is None:
        try:
            _draw(built)
        except UserError as error:  # what was trained is saved
            logger.error("%s", error)
    _conclude(built, stopped_by="" if stopped_by is None else stopped_by.name, conclusion=conclusion)
    _leave(built, together=stopped_by is not None)
    return 0 if stopped_by is None else 128 + stopped_by


@contextlib.contextmanager
def _naming_places(options: Options) -> Iterator[None]:
    """Errors about options say where in a file these stand: in a preset the user may not know of them."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{error}{places_of(str(error), options.given)}") from error


def _leave(built: Built, *, together: bool) -> None:
    """Close the logs, and leave the other processes: `together` where this one ends with another code than 0, for a
    launcher then ends all of them, and the first may still be writing files."""
    from library.record import trackers

    trackers.end(built.run.accelerator)
    if together:
        built.run.accelerator.wait_for_everyone()
    built.run.accelerator.state.destroy_process_group()


def _conclude(built: Built, *, stopped_by: str, conclusion: str) -> None:
    """End the metrics, and make the report of them. Neither matters so much as what was trained."""
    from library.record import metrics

    built.run.monitor.end(stopped_by=stopped_by, conclusion=conclusion)
    path = metrics.metrics_path(built.saves.last_file)
    if built.plan.options.monitoring.writes_report and built.run.accelerator.is_main_process and path.is_file():
        from library.report import page

        try:
            page.write(path)
        except UserError as error:
            logger.warning("no report: %s", error)


def _draw(built: Built) -> None:
    """The curve of the loss, and the prompts drawn without and with the LoRA, beside the last file."""
    from library.report import loss_plot
    from library.run.build import pictures
    from library.run.encode import vae_dtype
    from library.sampling import render as sample
    from library.training.hooks import ema

    options, family = built.plan.options, built.plan.family
    paths = pictures(options, built.saves)
    if path := paths.get("loss"):
        steps_per_epoch = built.saves.steps_per_epoch
        title = built.saves.last_file.stem
        loss_plot.plot(path, built.run.losses, steps_per_epoch=steps_per_epoch, title=title)
        logger.info("drew %s", path)
    if path := paths.get("compare"):
        if "vae" not in family.components:
            family.components.load("vae", vae_dtype(family, options), built.run.accelerator.device)
        with ema.weights_for(built.run.ema, "sample"):
            sample.compare(
                path,
                family,
                built.prompts,
                built.run.network.off,
                options.output.compare_prompts,
                size=built.plan.datasets[0].resolution,
                steps=options.output.compare_steps,
                seed=built.plan.seed,
            )
        logger.info("drew %s", path)
