"""A whole job: the data check; or plan, then the contact sheet of the data or advice; or build, then a dry run, the
rate finder, or the training and its pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from library import log, out_of_memory, processes
from library.config.options import Options
from library.config.settings import places_of
from library.errors import CommonError, UserError
from library.run.plan import make_plan

if TYPE_CHECKING:
    from library.record.run_file import RunFile
    from library.run.plan import Plan
    from library.training.run import Run

logger = logging.getLogger(__name__)


def run(options: Options, *, families: tuple[str, ...] = ()) -> int:
    """Returns the exit code: 0, or 128 and the signal (Ctrl-C: 130) that ended the run early, after saving."""
    if options.run.check_data:
        if processes.is_first():
            from library.guidance import data_check

            with _naming_places(options):
                data_check.report(options, families=families)
        return 0
    with _advised(), _naming_places(options):
        plan = make_plan(options, families=families)
        if options.guidance.fit:
            plan = _fitted(plan, families)
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
    from library.record.run_file import RunFile

    with RunFile() as record, _advised(plan):
        return _carry_out(plan, record)


def _fitted(plan: Plan, families: tuple[str, ...]) -> Plan:
    """The plan with the options that --fit chooses, the same in all processes."""
    from library.guidance import fit
    from library.parallel import together

    options = together.agreed(fit.fitted(plan), timeout=together.patience(plan.options.run.ddp_timeout))
    if options == plan.options:
        return plan
    seeded = dataclasses.replace(options, training=dataclasses.replace(options.training, seed=plan.seed))
    with log.errors_only():  # the warnings of the first plan have been logged
        return make_plan(seeded, families=families)


def _carry_out(plan: Plan, record: RunFile) -> int:
    """Build the run, then a dry run, the rate finder, or the training. Returns the exit code."""
    # torch and all modules that need it load only now, after the commonest mistakes have been refused
    from library.guidance import dry_run, find_lr
    from library.record import summary
    from library.run import compiled
    from library.run.about.summary import facts_of
    from library.run.build import build
    from library.run.watch import watch

    options = plan.options
    with _naming_places(options):
        if options.guidance.find_lr:
            find_lr.refuse(plan.choice)
        run = build(plan, record)
    if options.run.dry_run:
        dry_run.report(plan, run, measure=options.run.dry_run == "measure", draw=options.run.dry_run == "curves")
        return 0
    facts = facts_of(plan, run, hashes=record.is_kept)
    for line in summary.lines(facts):
        logger.info("%s", line)
    if options.guidance.find_lr:
        with compiled.naming_errors(options):
            found = find_lr.find(plan, run)
        find_lr.report(plan, run, found)
        return 0
    watch(plan, run, facts, record)
    return _train(plan, run, record)


def _train(plan: Plan, run: Run, record: RunFile) -> int:
    """The training and its pictures. Returns the exit code."""
    from library.record import run_file
    from library.run import compiled
    from library.training import loop
    from library.training.hooks.saver import is_best
    from library.training.hooks.validation import Validator

    try:
        with compiled.naming_errors(plan.options):
            stopped_by = loop.train(run)
    except (UserError, out_of_memory.OutOfMemory) as error:
        record.end(run_file.FAILED, str(error))
        _conclude(plan, run, stopped_by="an error", conclusion="")
        if isinstance(error, CommonError):
            _leave(run, together=True)
        raise
    validator, best_file, conclusion = run.hook(Validator), run.saves.best_file, ""
    if validator is not None:
        kept = best_file.name if is_best(validator.history.best, best_file) else ""
        conclusion = validator.history.conclusion(best_file=kept) or ""
    if conclusion:
        logger.info("%s", conclusion)
    if stopped_by is None:
        record.end(run_file.FINISHED)
    else:
        record.end(run_file.STOPPED, stopped_by.name)
    _conclude(plan, run, stopped_by="" if stopped_by is None else stopped_by.name, conclusion=conclusion)
    _leave(run, together=stopped_by is not None)
    return 0 if stopped_by is None else 128 + stopped_by


@contextlib.contextmanager
def _advised(plan: Plan | None = None) -> Iterator[None]:
    """Makes an error of memory one that the user can correct, with the options that would save most in this run."""
    try:
        with out_of_memory.during(""):
            yield
    except out_of_memory.OutOfMemory as error:
        raise UserError(f"{error}. {_advice(plan)}") from None


def _advice(plan: Plan | None) -> str:
    """The three best levers of this run, computed; else the options that need less in general."""
    if plan is None:
        return out_of_memory.LESS_MEMORY
    from library.guidance import verdict

    try:
        with log.errors_only():
            best = verdict.best(plan) if verdict.is_computable(plan) else []
    except Exception as error:  # the advice must not hide the error itself
        logger.debug("no advice could be computed: %r", error)
        best = []
    if not best:
        return out_of_memory.LESS_MEMORY
    return f"What would save most: {'; '.join(best)}. --dry_run lists everything, --fit auto chooses"


@contextlib.contextmanager
def _naming_places(options: Options) -> Iterator[None]:
    """Adds to errors about options the place of each in a file: in a preset the user may not know of them."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{error}{places_of(str(error), options.given)}") from error


def _leave(run: Run, *, together: bool) -> None:
    """Close the logs and leave the process group. `together`: first wait for the others, because this process ends with
    a code other than 0: a launcher then kills all of them, and the first may still be writing files."""
    from library.record import trackers

    trackers.end(run.accelerator)
    if together:
        run.accelerator.wait_for_everyone()
    run.accelerator.state.destroy_process_group()


def _conclude(plan: Plan, run: Run, *, stopped_by: str, conclusion: str) -> None:
    """Render the pictures, end the metrics, then write the report. A failure here must not lose the trained network."""
    from library.record import metrics

    for hook in run.hooks:
        hook.end(run, stopped_by=stopped_by, conclusion=conclusion)
    path = metrics.metrics_path(run.saves.last_file)
    if plan.options.monitoring.writes_report and run.accelerator.is_main_process and path.is_file():
        from library.report import page

        try:
            page.write(path)
        except UserError as error:
            logger.warning("no report: %s", error)
