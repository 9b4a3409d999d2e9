"""Trainings of a command, one after the other, each in a process of its own: finished ones are not trained again, and
one that was interrupted resumes from its last state."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.options import Options
from library.errors import UserError
from library.files.typed_json import to_json
from library.record import run_file
from library.record.run_file import Record

NOT_COMPARED = ("resume", "overwrite", "config_file", "ddp_timeout")


@dataclass(frozen=True)
class PlannedRun:
    """One training: its words for train_network.py, and the options that they mean."""

    seed: int
    words: tuple[str, ...]
    options: Options

    @property
    def file(self) -> Path:
        """Its last network."""
        output = self.options.output
        return Path(output.output_dir) / f"{output.output_name}.{output.save_model_as}"

    @property
    def name(self) -> str:
        """In messages."""
        return str(self.options.output.output_name)


def state_words(own: Options) -> list[str]:
    """The words that let a training keep the state of its last epoch, and no more files than its settings ask for."""
    every, last = own.output.save_every_n_epochs, own.output.save_last_n_epochs
    words = ["--save_state", "--save_every_n_epochs", str(every or 1), "--save_last_n_epochs_state", "1"]
    return words + (["--save_last_n_epochs", str(last or 1)] if every is None else [])


def refuse_other_settings(one: PlannedRun) -> None:
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


def _in_effect(one: PlannedRun) -> dict[str, Any]:
    from library.run.recording import in_effect

    values: dict[str, Any] = to_json(in_effect(one.options, seed=one.seed))
    return {name: value for name, value in values.items() if name not in NOT_COMPARED}


def finished(one: PlannedRun) -> Record | None:
    """The record of a run that has finished; None for another."""
    record = run_file.read(run_file.run_path(one.file))
    if record is None or run_file.standing(record) != run_file.FINISHED or not one.file.is_file():
        return None
    return record


def train(one: PlannedRun, *, anew: bool) -> int:
    """Train, from the run's newest state where there is one, unless `anew`. Returns the exit code."""
    record = run_file.read(run_file.run_path(one.file))
    if record is not None and run_file.standing(record) == run_file.RUNNING and not anew:
        raise UserError(f"{one.file}: is being trained by another process (process {record.session.pid})")
    words = [*one.words, "--resume", "latest"] if not anew and _states(one) else [*one.words, "--overwrite"]
    code = run_program([sys.executable, _program(), *words])
    if code == 0:
        _forget_states(one)
    return code


def _forget_states(one: PlannedRun) -> None:
    """Remove the states of a finished run: each is several times as large as its network."""
    for state in _states(one):
        shutil.rmtree(state)


def run_program(command: Sequence[str]) -> int:
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


def _states(one: PlannedRun) -> list[Path]:
    from library.record import saves

    folder, name = one.file.parent, one.options.output.output_name
    return [path for path in folder.iterdir() if saves.is_state_name(path.name, name)] if folder.is_dir() else []
