"""NAME-metrics.jsonl: whole lines at any time, and nothing of another run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from unittest.mock import Mock

import pytest

from library.errors import UserError
from library.record.metrics import MetricsFile, lines, read_run, session_of

RUN = {"session_id": 7, "name": "fox"}


def written(path, steps, *, done=0, run=RUN):
    file = MetricsFile(path, run, done=done)
    for step in steps:
        file.write(step, {"loss": step / 10})
    file.close()
    return list(lines(path))


def test_a_line_for_each_write_behind_what_describes_the_run(tmp_path):
    path = tmp_path / "out" / "fox-metrics.jsonl"
    file = MetricsFile(path, RUN, done=0)
    assert not path.parent.exists()  # a run that does not get to a step leaves nothing
    file.write(1, {"loss": 0.123456789, "rates": {"unet": 1e-4}, "name": 'a "b"\n', "norms": (1.0, float("nan"))})
    file.write(1, {"warning": {"sign": "x"}})
    file.close()
    assert read_run(path) == {"format": 1, **RUN}
    assert [line for line in lines(path) if "step" in line] == [
        {"step": 1, "loss": 0.1234568, "rates": {"unet": 1e-4}, "name": 'a "b"\n', "norms": [1.0, None]},
        {"step": 1, "warning": {"sign": "x"}},
    ]


def test_a_resumed_run_drops_what_it_is_going_to_do_again(tmp_path):
    path = tmp_path / "fox-metrics.jsonl"
    written(path, range(1, 6))
    found = written(path, range(4, 7), done=3, run={**RUN, "name": "renamed"})
    assert [line.get("step") for line in found] == [None, 1, 2, 3, 4, 5, 6]
    assert read_run(path)["name"] == "renamed"


@pytest.mark.parametrize(("done", "run"), [(0, RUN), (3, {"session_id": 8})], ids=["from the start", "another run"])
def test_any_other_run_begins_anew(tmp_path, done, run):
    path = tmp_path / "fox-metrics.jsonl"
    written(path, range(1, 6))
    assert [line.get("step") for line in written(path, [9], done=done, run=run)] == [None, 9]


def test_whose_it_is(tmp_path):
    path = tmp_path / "fox-metrics.jsonl"
    assert session_of(path) is None
    written(path, [1])
    assert session_of(path) == 7
    for text in ("", "mine", "[1]\n", '{"run": 3}\n'):
        path.write_text(text)
        assert session_of(path) is None


def test_a_torn_last_line_is_passed_over(tmp_path):
    path = tmp_path / "fox-metrics.jsonl"
    written(path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-5])
    assert [line["step"] for line in lines(path) if "step" in line] == [1, 2]
    assert [line.get("step") for line in written(path, [3, 4], done=3)] == [None, 1, 2, 3, 4]


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_a_killed_process_leaves_whole_lines(tmp_path):
    program = """
        import itertools, pathlib, sys
        from library.record.metrics import MetricsFile
        file = MetricsFile(pathlib.Path(sys.argv[1]), {"session_id": 7}, done=0)
        for step in itertools.count(1):
            file.write(step, {"delta_norms": [0.1234] * 264})
            if step == 50:
                print("go", flush=True)
    """
    path = tmp_path / "fox-metrics.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    text = path.read_text()
    assert text.endswith("\n")
    found = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in found[1:]] == list(range(1, len(found)))
    assert len(found) > 50


def test_a_full_disk_costs_lines_and_not_the_training(tmp_path, caplog):
    class Full:
        """Takes half a line, or nothing, and later everything again."""

        def __init__(self, file):
            self.file, self.room = file, [7, 0]

        def write(self, text):
            if not self.room:
                return self.file.write(text)
            if size := self.room.pop(0):
                return self.file.write(text[:size])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    path = tmp_path / "fox-metrics.jsonl"
    file = MetricsFile(path, RUN, done=0)
    file.write(1, {"loss": 1.0})
    file._file = Full(file._file)
    for step in (2, 3, 4):
        file.write(step, {"loss": 1.0})
    file.close()
    (record,) = caplog.records
    assert "lines are missing from step 2 on, training continues" in record.getMessage()
    assert [json.loads(line).get("step") for line in path.read_text().splitlines()] == [None, 1, 4]


def test_a_disk_that_is_full_at_a_rollback_keeps_the_lines(tmp_path, caplog, monkeypatch):
    path = tmp_path / "fox-metrics.jsonl"
    file = MetricsFile(path, RUN, done=0)
    for step in (1, 2):
        file.write(step, {"loss": 1.0})
    with monkeypatch.context() as full:
        full.setattr(MetricsFile, "_begin", Mock(side_effect=UserError("No space left on device")))
        file.go_back(1)
    file.write(2, {"loss": 0.5})
    file.close()
    assert "lines after step 1 stay, training continues: No space left on device" in caplog.text
    assert [json.loads(line).get("step") for line in path.read_text().splitlines()] == [None, 1, 2, 2]


def test_names_that_are_no_utf_8(tmp_path):
    path, name = tmp_path / "fox-metrics.jsonl", os.fsdecode(b"\xff\x82 fox")
    assert written(path, [1], run={**RUN, "name": name})[0]["run"]["name"] == name
    path.read_bytes().decode()
