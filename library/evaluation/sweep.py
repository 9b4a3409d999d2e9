"""Several runs of train_network.py one after the other, each in a process of its own, that can be interrupted.

Finished runs are read, and one that was interrupted resumes from its last state, after its last whole epoch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library import log
from library.config import parser
from library.config.command import Command, read
from library.config.options import Options
from library.errors import UserError
from library.files.typed_json import to_json
from library.record import metrics, run_file

logger = logging.getLogger(__name__)

NOT_COMPARED = ("resume", "overwrite", "config_file", "ddp_timeout")
ANOTHER_JOB = ("dry_run", "check_data", "debug_dataset", "find_lr", "recommend", "resume")


@dataclass(frozen=True)
class Planned:
    """One run: its name in messages, its words for train_network.py, and the options that they mean."""

    name: str
    seed: int
    words: tuple[str, ...]
    options: Options

    @property
    def file(self) -> Path:
        """Its last network."""
        output = self.options.output
        return Path(output.output_dir) / f"{output.output_name}.{output.save_model_as}"


@dataclass(frozen=True)
class Outcome:
    """A finished run. `base`: the held-out loss before the first step; `loss`: the lowest after one, at `step`.
    `seconds`: of its processes."""

    base: float
    loss: float
    step: int
    seconds: float


def read_words(command: Command, argv: Sequence[str]) -> tuple[Mapping[str, Any], list[str]]:
    """The options of the command's groups, and the words behind -- for train_network.py, with the --config_file that
    the command has in its group "sweep". Raises UserError."""
    place = argv.index("--") if "--" in argv else len(argv)
    try:
        groups = read(command, argv[:place]).groups
    except UserError as error:
        hint = "\noptions of train_network.py stand behind --" * ("unknown option" in str(error))
        raise UserError(f"{error}{hint}") from None
    config_file = groups["sweep"].config_file
    return groups, [*([] if config_file is None else ["--config_file", config_file]), *argv[place + 1 :]]


def refuse_other_jobs(own: Options, command: str) -> None:
    """`UserError` for options that do something else than a new training."""
    given = vars(own.run) | vars(own.guidance)
    for name in ANOTHER_JOB:
        if given[name]:
            raise UserError(f"--{name}: leave it out; {command} trains new networks")


def state_words(own: Options) -> list[str]:
    """The words that save one state, after each epoch or as often as the user saves networks."""
    every, last = own.output.save_every_n_epochs, own.output.save_last_n_epochs
    words = ["--save_state", "--save_every_n_epochs", str(every or 1), "--save_last_n_epochs_state", "1"]
    return words + (["--save_last_n_epochs", str(last or 1)] if every is None else [])


def options_of(words: Sequence[str]) -> Options:
    """The options of a run, without the warnings that came with the user's own."""
    with log.errors_only():
        return parser.parse(list(words))


def refuse_other_settings(one: Planned) -> None:
    """`UserError` where the folder holds a run of this name with other settings."""
    record = run_file.read(run_file.run_path(one.file))
    if record is None:
        return
    now = _in_effect(one)
    different = [name for name, value in now.items() if record.settings.in_effect.get(name) != value]
    if different:
        shown = ", ".join(
            f"--{name} {record.settings.in_effect.get(name)} there, {now[name]} here" for name in different[:3]
        )
        raise UserError(
            f"{one.file.parent} holds a sweep with other settings ({one.name}: {shown}): give another --output_name, "
            "or --overwrite before the -- to train everything again"
        )


def _in_effect(one: Planned) -> dict[str, Any]:
    from library.run.about.recording import in_effect

    values: dict[str, Any] = to_json(in_effect(one.options, seed=one.seed))
    return {name: value for name, value in values.items() if name not in NOT_COMPARED}


def train_all(runs: Sequence[Planned], *, anew: bool) -> tuple[list[Outcome], int]:
    """Train what is not finished, in order. Returns the outcomes, and the exit code of the run that failed or was
    stopped, after which none follows, else 0. `anew`: train finished runs again, too."""
    done: list[Outcome] = []
    for one in runs:
        result = None if anew else finished(one)
        if result is None:
            logger.info("training %s", one.name)
            if code := train(one, anew=anew):
                print(f"{one.name}: ended with exit code {code}; the same command continues the sweep", file=sys.stderr)
                return done, code
            result = finished(one)
            if result is None:
                raise UserError(f"{one.file}: its run ended without a validation: look at its messages")
        done.append(result)
    return done, 0


def finished_record(one: Planned) -> run_file.Record | None:
    """The record of a run that has finished; None for another."""
    record = run_file.read(run_file.run_path(one.file))
    if record is None or run_file.standing(record) != run_file.FINISHED or not one.file.is_file():
        return None
    return record


def finished(one: Planned) -> Outcome | None:
    """The outcome of a run that has finished; None for another."""
    if (record := finished_record(one)) is None:
        return None
    validations = [
        (line["validation"]["loss"], line["step"])
        for line in metrics.lines(metrics.metrics_path(one.file))
        if "validation" in line and line["validation"].get("loss") is not None
    ]
    base = next((loss for loss, step in validations if step == 0), None)
    after = [(loss, step) for loss, step in validations if step > 0]
    if base is None or not after:
        return None
    loss, step = min(after)
    return Outcome(
        base, loss, step, sum((session.ended or session.heartbeat) - session.started for session in record.sessions)
    )


def train(one: Planned, *, anew: bool) -> int:
    """Train in a process of its own, from the run's newest state where there is one. Returns the exit code."""
    record = run_file.read(run_file.run_path(one.file))
    if record is not None and run_file.standing(record) == run_file.RUNNING and not anew:
        raise UserError(f"{one.file}: is being trained by another process (process {record.session.pid})")
    words = [*one.words, "--resume", "latest"] if not anew and _states(one) else [*one.words, "--overwrite"]
    code = _run([sys.executable, _program(), *words])
    if code == 0:
        _forget_states(one)
    return code


def _forget_states(one: Planned) -> None:
    """Remove the states of a finished run: each is several times as large as its network."""
    for state in _states(one):
        shutil.rmtree(state)


def _run(command: Sequence[str]) -> int:
    """Run a program to its end and return its exit code. Ctrl-C reaches it as well, and SIGTERM is passed on to it: it
    saves its state and ends, and only then does this function return."""
    with subprocess.Popen(command) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            while True:
                with contextlib.suppress(KeyboardInterrupt):
                    return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def _program() -> str:
    found = importlib.util.find_spec("train_network")
    assert found is not None, "train_network.py is installed beside this package"
    assert found.origin is not None
    return found.origin


def _states(one: Planned) -> list[Path]:
    from library.record import saves

    folder, name = one.file.parent, one.options.output.output_name
    return [path for path in folder.iterdir() if saves.is_state_name(path.name, name)] if folder.is_dir() else []
