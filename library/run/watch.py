"""Has a run watched: its monitor, the file of its metrics, and its record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.record import metrics
from library.run import header as run_header
from library.training.hooks.monitor import Monitor

if TYPE_CHECKING:
    from library.record.facts import Facts
    from library.run.build import Built


def watch(built: Built, facts: Facts) -> None:
    """Describe the run in its record and its metrics, and have its steps reported there, unless it has no meter."""
    run, record = built.run, built.record
    record.describe(facts)
    if run.meter is None:
        return
    header = run_header.describe(built, facts)
    file = None
    if run.accelerator.is_main_process:
        file = metrics.MetricsFile(metrics.metrics_path(built.saves.last_file), header, done=run.done)
    every = built.plan.options.monitoring.every
    run.monitor = Monitor(run.meter, run=run, every=every, bins=header["timesteps"], file=file, record=record)
