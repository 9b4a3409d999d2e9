"""`NAME-metrics.jsonl`: the log of a run, one JSON object a line, beside its files.

The first line describes the run: {"run": {…}}. Every other line has a "step" and its values: of a step of the optimizer
("loss", "rates" …), {"validation": {…}}, {"validation_sets": {…}}, {"gap": {…}}, {"forgetting": {…}} or
{"warning": {…}}. Numbers that are not finite are null. Lines are appended
whole, so that a run may be killed at any time. After a power cut the last line may be incomplete; it is ignored.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files.atomic import replacing

logger = logging.getLogger(__name__)

FORMAT = 1
SUFFIX = "-metrics.jsonl"
REPORT_SUFFIX = "-report.html"  # library/report makes it of the lines

Line = dict[str, Any]


class MetricsFile:
    """The metrics file of the current run. Nothing is written before the first line."""

    def __init__(self, path: Path, run: Line, *, done: int) -> None:
        """`run`: the first line's contents, which have a "session_id". After a resume at step `done` this session's
        lines up to there are kept. Raises UserError if the file cannot be written."""
        self.path = path
        self._file: Any = None
        self._run = {"format": FORMAT, **run}
        self._incomplete = False
        if done and session_of(path) == run["session_id"]:
            self._begin(done)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line. One that cannot be written is dropped, the first with a warning: training continues."""
        text = _text({"step": step, **values})
        try:
            if self._file is None:
                self._begin(0)
            before = os.fstat(self._file.fileno()).st_size
            # unbuffered, in one piece: a killed process has written the whole line or nothing
            if self._file.write(text) < len(text):
                self._file.truncate(before)
                raise OSError("only a part of the line was written")
        except (OSError, UserError) as error:
            if not self._incomplete:
                logger.warning("%s: lines are missing from step %d on, training continues: %s", self.path, step, error)
            self._incomplete = True

    def go_back(self, step: int) -> None:
        """Drop the lines of later steps. If the file cannot be written anew, they stay, with a warning."""
        if self._file is None:
            return
        self._file.close()
        try:
            self._begin(step)
        except (OSError, UserError) as error:
            logger.warning("%s: lines after step %d stay, training continues: %s", self.path, step, error)
            self._file = self.path.open("ab", buffering=0)

    def kept(self) -> Iterator[Line]:
        """The lines of earlier processes."""
        return (line for line in lines(self.path) if "step" in line) if self._file is not None else iter(())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _begin(self, done: int) -> None:
        """Write the first line and the lines to keep, and open the file for more."""
        with replacing(self.path) as beside, beside.open("wb") as file:
            file.write(_text({"run": self._run}))
            for line in lines(self.path) if done else ():
                if line.get("step", done + 1) <= done:
                    file.write(_text(line))
        self._file = self.path.open("ab", buffering=0)


def metrics_path(last_file: Path) -> Path:
    """Beside the last file of a run: fox.safetensors → fox-metrics.jsonl."""
    return last_file.with_name(last_file.stem + SUFFIX)


def report_path(metrics: Path) -> Path:
    """Beside the metrics: fox-metrics.jsonl → fox-report.html."""
    return metrics.with_name(metrics.name.removesuffix(SUFFIX) + REPORT_SUFFIX)


def session_of(path: Path) -> int | None:
    """The id of the run that a metrics file is about; None for another file or a missing one."""
    session = read_run(path).get("session_id")
    return session if isinstance(session, int) else None


def session_of_report(path: Path) -> int | None:
    """The id of the run that a report is about; None for a file that is no report."""
    with path.open("rb") as file:
        start = file.read(2000).decode("utf-8", "replace")
    found = re.search(r'<meta name="session" content="(\d+)">', start)
    return int(found[1]) if found else None


def read_run(path: Path) -> Line:
    """The first line's description of the run; empty if there is none."""
    run = next(lines(path), {}).get("run")
    return run if isinstance(run, dict) else {}


def lines(path: Path) -> Iterator[Line]:
    """Every line that is whole, one at a time."""
    if not os.path.isfile(path):
        return
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def _text(line: Line) -> bytes:
    """In UTF-8; bytes of a file's name that are none are written as JSON's escapes."""
    return (json.dumps(plain(line), ensure_ascii=False, separators=(",", ":")) + "\n").encode(errors="backslashreplace")


def rounded(value: float, digits: int = 4) -> float:
    """The value rounded to this many significant digits."""
    return float(f"{value:.{digits}g}")


def plain(value: Any) -> Any:
    """A JSON value: floats with 7 digits, the precision of fp32; None for those that are not finite."""
    if isinstance(value, float):
        return rounded(value, 7) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)
