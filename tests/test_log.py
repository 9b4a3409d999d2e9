"""Where messages go: in processes of their own, as levels and handlers belong to a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from library import log
from library.errors import UserError
from tests.conftest import BASE, ROOT


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A mistake that is found after the options were read; --xformers gives a warning before that."""
    command = [sys.executable, str(ROOT / "train_network.py"), "--pretrained_model_name_or_path", str(BASE)]
    command += ["--train_data_dir", str(tmp_path / "absent"), "--output_dir", "out", "--xformers", "--resolution", "64"]
    return subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)


def test_messages_are_on_stderr(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 2
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("warning: command line: --xformers: has no effect")
    assert last.startswith("error: ")


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
    assert "that is dpmsolver++ here" in result.stderr
    assert "did you mean 'DEBUG'?" in result.stderr


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    log.set_up()
    with pytest.raises(UserError, match=r"--console_log_file .*cannot be written"):
        log.configure(file=str(tmp_path / "file" / "x.log"))
    log.give_up_waiting()
