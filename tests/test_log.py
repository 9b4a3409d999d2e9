"""Where messages go: in processes of their own, as levels and handlers belong to a process."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library import log
from library.errors import UserError
from tests.conftest import BASE, PATIENCE, ROOT


def run(tmp_path: Path, *words: str, stderr: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """A mistake that is found after the options were read; --xformers gives a warning before that."""
    command = [sys.executable, str(ROOT / "train_network.py"), "--pretrained_model_name_or_path", str(BASE)]
    command += ["--train_data_dir", str(tmp_path / "absent"), "--output_dir", "out", "--xformers", "--resolution", "64"]
    return subprocess.run(
        [*command, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=PATIENCE
    )


def test_messages_are_on_stderr(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 2
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("warning: command line: --xformers: has no effect")
    assert last.startswith("error: ")


@pytest.mark.slow
def test_a_level_hides_what_is_below_it(tmp_path):
    result = run(tmp_path, "--console_log_level", "ERROR")
    assert "xformers" not in result.stderr
    assert "error: " in result.stderr


def test_a_file_takes_the_place_of_the_console(tmp_path):
    result = run(tmp_path, "--console_log_file", str(tmp_path / "logs" / "run.log"))
    assert "xformers" not in result.stderr
    assert "error: " in result.stderr  # what stops the run is always shown
    assert "warning: " in (tmp_path / "logs" / "run.log").read_text()


def test_warnings_before_a_mistake_in_the_options_are_shown(tmp_path):
    result = run(tmp_path, "--console_log_level", "DEBUGG", "--sample_sampler", "dpmpp_2m")
    assert "its name here is dpmsolver++" in result.stderr
    assert "did you mean 'DEBUG'?" in result.stderr


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    log.set_up()
    with pytest.raises(UserError, match=r"--console_log_file .*cannot be written"):
        log.configure(file=str(tmp_path / "file" / "x.log"))
    log.give_up_waiting()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.slow
def test_a_full_disk_below_stderr_changes_nothing(tmp_path):
    """Not even the exit code, which Python would make 120."""
    with open("/dev/full", "w") as full:
        assert run(tmp_path, stderr=full).returncode == 2


def test_nobody_reads_the_help():
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, str(ROOT / "train_network.py"), "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


def test_what_a_stream_does_not_take_is_left_out(monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str = "") -> int:
            raise OSError(28, "No space left on device")

        flush = write

    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(sys, "stdout", ascii_only)
    with log.lasting_streams():
        print("lost", file=sys.stderr, flush=True)
        print("a cat, 猫")
    assert ascii_only.buffer.getvalue() == rb"a cat, \u732b" + b"\n"
    assert sys.stdout is ascii_only


def test_a_log_file_on_a_full_disk_leaves_the_lines_to_stderr(monkeypatch, capsys):
    log.configure(file="/dev/full" if Path("/dev/full").exists() else pytest.skip("a device of Linux"))
    logging.getLogger("library.x").warning("read me")
    assert capsys.readouterr().err == "warning: read me\n"
    log.configure()
