"""NAME-run.json: how a run stands at any time, written beside the steps and never by them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.record import run_file
from library.record.run_file import Given, Record, RunFile, Settings, new_session, read, standing
from tests.conftest import PATIENCE


def record(*, first_step: int = 0, run: int = 7) -> Record:
    session = new_session(started=None, first_step=first_step, command=["--seed", "1"])
    settings = Settings(given={"seed": Given(value=1, place="command line: --seed")}, in_effect={"seed": 1})
    return Record(id=run, name="fox", steps_total=10, sessions=[session], settings=settings)


def written(path: Path) -> Record:
    found = read(path)
    assert found is not None
    return found


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_before_it_begins_and_in_other_processes_nothing_is_written(tmp_path):
    with RunFile() as run:
        run.step(3)
        run.wrote(tmp_path, kind="network", step=3)
        assert not run.is_kept
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_its_begin_to_its_end(tmp_path):
    path, file = tmp_path / "fox-run.json", tmp_path / "fox.safetensors"
    before = time.time()
    with RunFile() as run:
        run.begin(path, record())
        first = written(path).session
        assert (first.status, first.pid, first.host) == ("running", os.getpid(), socket.gethostname())
        assert before <= first.started <= first.heartbeat <= time.time()
        assert first.ended is None
        assert standing(written(path)) == "running"
        file.write_bytes(b"12345")
        run.wrote(file, kind="network", step=4)
        run.step(10)
        run.wrote(file, kind="network", step=10)
        run.end("finished")
    found = written(path)
    assert (found.session.status, found.session.steps_done) == ("finished", 10)
    assert [(item.name, item.step, item.bytes) for item in found.files] == [("fox.safetensors", 10, 5)]
    # what a program reads that looks no further than the first lines
    table = json.loads(path.read_text())
    assert list(table)[:11] == [
        *("format", "id", "name", "status", "reason", "pid", "host", "started", "heartbeat", "ended", "steps_done")
    ]
    assert (table["format"], table["id"], table["steps_done"], table["steps_total"]) == (1, 7, 10, 10)
    assert table["ended"] == found.session.ended


def test_steps_write_nothing_and_the_thread_seldom(tmp_path, monkeypatch):
    writers, replacing, others = [], run_file.replacing, set(threading.enumerate())

    def counted(path: Path) -> Any:
        writers.append(threading.current_thread())
        return replacing(path)

    monkeypatch.setattr(run_file, "replacing", counted)
    monkeypatch.setattr(run_file, "BEAT", 0.2)
    began = time.monotonic()
    with RunFile() as run:
        run.begin(tmp_path / "fox-run.json", record())
        step = 0
        while time.monotonic() < began + 1:
            step += 1
            run.step(step)
        beats = (time.monotonic() - began) / 0.2
    main = threading.main_thread()
    assert step > 10_000
    assert [writers[0], writers[-1]] == [main, main]  # its begin and its end
    assert 1 <= len(writers[1:-1]) <= beats + 1
    assert main not in writers[1:-1]
    assert not any(thread.name == "run record" for thread in set(threading.enumerate()) - others)


def test_the_heart_beats_while_no_step_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(run_file, "BEAT", 0.02)
    path = tmp_path / "fox-run.json"
    with RunFile() as run:
        run.begin(path, record())
        first = written(path).session.heartbeat
        wait_for(lambda: written(path).session.heartbeat > first)
        run.step(5)
        wait_for(lambda: written(path).session.steps_done == 5)
        run.step(3)  # it went back after a divergence
        wait_for(lambda: written(path).session.steps_done == 3)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "finished", ""),
        (KeyboardInterrupt(), "stopped", "SIGINT"),
        (UserError("the disk is full"), "failed", "the disk is full"),
        (RuntimeError("odd"), "failed", "RuntimeError: odd"),
        (UserError("the key s3cret is wrong"), "failed", "the key (given) is wrong"),
    ],
    ids=["none", "Ctrl-C", "the user's", "a bug", "a secret"],
)
def test_what_ended_it(tmp_path, error, status, reason):
    path = tmp_path / "fox-run.json"
    expected = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with expected, RunFile() as run:
        run.begin(path, record(), secrets=["s3cret"])
        if error is not None:
            raise error
    session = written(path).session
    assert (session.status, session.reason) == (status, reason)
    assert session.ended is not None


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_a_killed_process_ends_without_a_word(tmp_path):
    program = """
        import pathlib, sys, time
        from library.record import run_file
        from tests.record.test_run_file import record
        run_file.BEAT = 0.001
        with run_file.RunFile() as run:
            run.begin(pathlib.Path(sys.argv[1]), record())
            print("go", flush=True)
            time.sleep(1000)
    """
    path = tmp_path / "fox-run.json"
    command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(200):
            assert standing(written(path)) == "running"  # whole, whenever it is read
        process.send_signal(signal.SIGKILL)
    found = written(path)
    assert found.session.status == "running"
    assert standing(found) == "lost"


def test_a_run_on_another_machine_is_judged_by_its_heartbeat():
    session = replace(record().session, host="elsewhere", pid=2**22 + 1, heartbeat=1000.0)
    there = replace(record(), sessions=[session])
    assert standing(there, now=1000.0 + run_file.SILENT) == "running"
    assert standing(there, now=1001.0 + run_file.SILENT) == "lost"
    assert standing(replace(there, sessions=[replace(session, host=socket.gethostname())]), now=1000.0) == "lost"
    assert standing(replace(there, sessions=[replace(session, status="failed")]), now=1e9) == "failed"


def test_a_resumed_run_goes_on_with_its_record(tmp_path):
    path = tmp_path / "fox-run.json"
    with RunFile() as run:
        run.begin(path, record())
        for step in (2, 4, 6):
            run.step(step)
            (tmp_path / f"{step}").touch()
            run.wrote(tmp_path / f"{step}", kind="network", step=step)
        run.end("running")  # as a kill leaves it
    for run_id, sessions, files in ((7, ["lost", "finished"], ["2", "4"]), (8, ["finished"], [])):
        with RunFile() as run:
            run.begin(path, record(first_step=4, run=run_id))
        found = written(path)
        assert [session.status for session in found.sessions] == sessions
        assert [item.name for item in found.files] == files
        assert (found.session.first_step, found.session.steps_done) == (4, 4)
    with RunFile() as run:  # from the start: not the same run, whatever its id
        run.begin(path, record(run=8))
    assert len(written(path).sessions) == 1


def test_a_full_disk_costs_a_message_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(path: Path) -> Any:
        raise UserError(f"{path}: not written: the disk is full")

    monkeypatch.setattr(run_file, "replacing", full)
    monkeypatch.setattr(run_file, "BEAT", 0.01)
    with RunFile() as run:
        run.begin(tmp_path / "fox-run.json", record())
        time.sleep(0.1)
    (message,) = [item.getMessage() for item in caplog.records]
    assert message.endswith("fox-run.json: not written: the disk is full. Training continues without the run's record")


@pytest.mark.parametrize("text", ["", "mine", "[1]", "{}", '{"format": 2}', '{"format": 1, "id": "x"}'])
def test_other_files_are_no_records(tmp_path, text):
    (tmp_path / "fox-run.json").write_text(text)
    assert read(tmp_path / "fox-run.json") is None
    assert read(tmp_path / "none-run.json") is None


def test_what_a_later_version_adds_does_not_matter(tmp_path):
    path = tmp_path / "fox-run.json"
    with RunFile() as run:
        run.begin(path, record())
    table = json.loads(path.read_text())
    table["sessions"][0]["mood"] = table["weather"] = "fine"
    path.write_text(json.dumps(table))
    assert written(path).session.status == "finished"


def test_names_that_are_no_utf_8(tmp_path):
    name = os.fsdecode(b"\xff\x82 fox")
    with RunFile() as run:
        run.begin(tmp_path / "fox-run.json", replace(record(), name=name))
    assert written(tmp_path / "fox-run.json").name == name
