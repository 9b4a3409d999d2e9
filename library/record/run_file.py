"""`NAME-run.json`: the facts about a run and its status, beside its files.

It is written before the first model is loaded, and again every few seconds by a thread until the run ends, so that its
heartbeat continues while images are encoded, and no step waits for the disk. A process that is killed leaves the status
"running" with an old heartbeat; `standing` recognises it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.files.atomic import replacing
from library.files.typed_json import from_json, to_json
from library.record.facts import Facts

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

FORMAT = 1
NOTHING: Mapping[str, int] = {}
SUFFIX = "-run.json"
BEAT = 5.0  # seconds from one writing to the next
SILENT = 60.0  # seconds without a heartbeat after which a run counts as lost

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
HIDDEN = "(given)"  # stands for the value of a secret option
LOST = "lost"  # never written by the run itself: it ended without writing a status


@dataclass(frozen=True, kw_only=True)
class Given:
    """An option as the user gave it: its value and its place ("command line: --seed")."""

    value: object
    place: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options by name. `given`: those that the user set. `in_effect`: all of them, with the seed in use."""

    given: dict[str, Given]
    in_effect: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file or a state's folder, written after `step` steps. `kind`: "network" or "state". `bytes`: of a file.
    `loads`: of the last network, how many of its layers each program finds (`networks.formats.loaders`); else empty."""

    name: str
    kind: str
    step: int
    bytes: int | None
    loads: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Session:
    """One process of a run, from `first_step` (0: from the beginning) to `steps_done`. Times are Unix times.

    `status`: "running", "finished" (an early end by validation as well), "stopped" (by Ctrl-C or another signal),
    "failed", or of an earlier session "lost". `reason`: the signal or the error.
    """

    status: str = RUNNING
    reason: str = ""
    pid: int
    host: str
    started: float
    heartbeat: float
    ended: float | None = None
    first_step: int = 0
    steps_done: int = 0
    command: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Record:
    """The whole of a `NAME-run.json`. `id`: `ss_session_id` of the run's files. `sessions`: the last is the newest;
    there are several if the run was resumed. `facts` None: the models are being loaded."""

    format: int = FORMAT
    id: int
    name: str
    steps_total: int
    sessions: list[Session]
    settings: Settings
    facts: Facts | None = None
    files: list[Written] = field(default_factory=list)

    @property
    def session(self) -> Session:
        return self.sessions[-1]


def new_session(*, started: float | None, first_step: int, command: list[str]) -> Session:
    """The session of this process. `started` None: now."""
    now = time.time()
    return Session(
        pid=os.getpid(),
        host=socket.gethostname(),
        started=now if started is None else started,
        heartbeat=now,
        first_step=first_step,
        steps_done=first_step,
        command=command,
    )


class RunFile:
    """The record of this process's run. `begin` starts it; before that, and in all processes but the first, the other
    methods do nothing. As a context it records the reason of the run's end, unless `end` was called."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._record: Record | None = None
        self._done = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed = False
        self._secrets: Collection[str] = ()

    @property
    def is_kept(self) -> bool:
        """Whether this process writes a record of the run."""
        return self._record is not None

    def begin(self, path: Path, record: Record, *, secrets: Collection[str] = ()) -> None:
        """Write the record for the first time, and keep it up to date. An earlier one of this run is continued.

        `secrets`: texts that must not be in it, even if an error's message contains them.
        """
        earlier = read(path)
        if record.session.first_step and earlier is not None and earlier.id == record.id:
            record = _going_on(earlier, record)
        self._path, self._record, self._done = path, record, record.session.steps_done
        self._secrets = secrets
        self._write()
        self._thread = threading.Thread(target=self._keep_up, name="run record", daemon=True)
        self._thread.start()

    def describe(self, facts: Facts) -> None:
        """Add the run's facts, which are known once all is loaded."""
        self._change(facts=facts)

    def step(self, done: int) -> None:
        """Record the number of steps done. Costs no more than an assignment: the thread writes it."""
        self._done = done

    def wrote(self, path: Path, *, kind: str, step: int, loads: Mapping[str, int] = NOTHING) -> None:
        """Record a written file or folder, in the place of an earlier one of the same name."""
        if self._record is None:
            return
        size = path.stat().st_size if path.is_file() else None
        others = [item for item in self._record.files if item.name != path.name]
        self._change(files=[*others, Written(name=path.name, kind=kind, step=step, bytes=size, loads=dict(loads))])

    def end(self, status: str, reason: str = "") -> None:
        """Write the record for the last time."""
        if self._record is None or self._over.is_set():
            return
        for secret in self._secrets:
            reason = reason.replace(secret, HIDDEN)
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._change(session=replace(self._record.session, status=status, reason=reason, ended=time.time()))
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.end(FINISHED)
        elif isinstance(error, KeyboardInterrupt):
            self.end(STOPPED, "SIGINT")
        else:
            self.end(FAILED, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")

    def _change(self, *, session: Session | None = None, **parts: Any) -> None:
        """Replace parts. No object is changed in place, so the thread always sees a consistent record."""
        if self._record is None:
            return
        if session is not None:
            parts["sessions"] = [*self._record.sessions[:-1], session]
        self._record = replace(self._record, **parts)

    def _keep_up(self) -> None:
        while not self._over.wait(BEAT):
            self._write()

    def _write(self) -> None:
        """Write the record, on the thread while there is one. A write error is logged and does not end the run."""
        record, path = self._record, self._path
        assert record is not None
        assert path is not None
        session = replace(record.session, heartbeat=time.time(), steps_done=self._done)
        text = _text(replace(record, sessions=[*record.sessions[:-1], session]))
        try:
            with replacing(path) as beside:
                beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        except UserError as error:
            if not self._failed:
                logger.warning("%s. Training continues without the run's record", error)
            self._failed = True


def _going_on(earlier: Record, record: Record) -> Record:
    """The record of a resumed run, with the earlier sessions, and the files written before its first step."""
    sessions = list(earlier.sessions)
    if sessions[-1].status == RUNNING:
        sessions[-1] = replace(sessions[-1], status=LOST)
    files = [item for item in earlier.files if item.step <= record.session.first_step]
    return replace(record, sessions=[*sessions, record.session], files=files)


def _text(record: Record) -> str:
    """The record as JSON, beginning with the status of the newest session, for simple readers."""
    table = to_json(record)
    now = table["sessions"][-1]
    head = {"format": table["format"], "id": table["id"], "name": table["name"]}
    state = {name: now[name] for name in ("status", "reason", "pid", "host", "started", "heartbeat", "ended")}
    steps = {"steps_done": now["steps_done"], "steps_total": table["steps_total"]}
    return (
        json.dumps({**head, **state, **steps, "command": now["command"], **table}, indent=1, ensure_ascii=False) + "\n"
    )


# -- reading


def run_path(last_file: Path) -> Path:
    """Beside the last file of a run: fox.safetensors → fox-run.json."""
    return last_file.with_name(last_file.stem + SUFFIX)


def read(path: Path) -> Record | None:
    """The record; None if there is none, or none that this version can read."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, Mapping) or table.get("format") != FORMAT or not table.get("sessions"):
            return None
        return from_json(Record, table)
    except (OSError, ValueError, RecursionError):
        return None


def standing(record: Record, *, now: float | None = None) -> str:
    """The status, but "lost" for a "running" one whose process no longer exists or whose heartbeat is old."""
    session = record.session
    if session.status != RUNNING:
        return session.status
    silent = (time.time() if now is None else now) - session.heartbeat > SILENT
    here = session.host == socket.gethostname()
    return LOST if silent or (here and not _lives(session.pid)) else RUNNING


def _lives(pid: int) -> bool:
    """Whether this process exists on this machine; True if only the heartbeat can show it."""
    if os.name != "posix":  # on Windows this would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
