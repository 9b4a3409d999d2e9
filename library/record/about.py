"""The files about a run, beside its networks: its record, its metrics, and the report of both."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from library.record import metrics, run_file

logger = logging.getLogger(__name__)


def planned_files(last_file: Path, *, monitoring: bool, report: bool) -> list[Path]:
    """The files about the run whose last network is `last_file`."""
    path = metrics.metrics_path(last_file)
    return [run_file.run_path(last_file), path] * monitoring + [metrics.report_path(path)] * report


def in_the_way(files: Sequence[Path], *, resumed: int | None, left_anything: bool) -> list[Path]:
    """The existing ones of these files that must not be replaced. A resumed run, with this session id, continues its
    own, and files about a run that ended before it saved anything may be replaced."""
    if resumed is not None:
        return [file for file in files if session_of(file) != resumed]
    if left_anything:
        return list(files)
    idle = [file for file in files if session_of(file) is not None]
    if idle:
        logger.info("replacing %s, of a run that saved nothing", ", ".join(map(str, idle)))
    return [file for file in files if file not in idle]


def session_of(path: Path) -> int | None:
    """The id of the run that a file is about; None for a file that is not there or not about a run."""
    if not os.path.isfile(path):
        return None
    if path.name.endswith(run_file.SUFFIX):
        record = run_file.read(path)
        return None if record is None else record.id
    if path.name.endswith(metrics.REPORT_SUFFIX):
        return metrics.session_of_report(path)
    return metrics.session_of(path)
