"""Describes a run that is ready to start, in its record and in the file of its metrics."""

from __future__ import annotations

from library.record import metrics
from library.record.facts import Facts
from library.record.run_file import RunFile
from library.run.about import header
from library.run.plan import Plan
from library.training.hooks.monitor import Monitor
from library.training.run import Run


def watch(plan: Plan, run: Run, facts: Facts, record: RunFile) -> None:
    """Without a monitor there are no metrics. Raises UserError if their file cannot be written."""
    record.describe(facts)
    monitor = run.hook(Monitor)
    if monitor is not None and run.accelerator.is_main_process:
        path, first_line = metrics.metrics_path(run.saves.last_file), header.describe(plan, run, facts)
        monitor.open(metrics.MetricsFile(path, first_line, done=run.position.done))
