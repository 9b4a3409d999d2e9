"""docs/gpu.md names every test and part that there is, its commands exist, and it says what has not run yet."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

from library.config.options import declared_options
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]


def test_every_test_and_part_is_named() -> None:
    from benchmarks.gpu.parts import PARTS

    tests = {
        name
        for file in (ROOT / "tests" / "gpu").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted([*tests, *PARTS])


def test_the_options_that_are_named_exist() -> None:
    named = set(re.findall(r"--(?:no-)?(\w+)", PAGE)) - {"out", "seconds"}  # of the benchmarks
    assert named <= declared_options().keys()


def test_every_command_exists() -> None:
    """Without a GPU as well. tests/benchmarks/test_gpu_benchmark.py runs what they measure, with tiny models."""
    assert len(COMMANDS) == 4
    for command in COMMANDS:
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            continue
        assert command[:2] == ["python", "-m"]
        ask = ["--collect-only", "-q"] if command[2] == "pytest" else ["--help"]
        done = subprocess.run(
            [sys.executable, *command[1:], *ask], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        for word in command[3:]:
            if word.startswith("--"):
                assert word in done.stdout
    assert "**Nothing here has run on a GPU yet.**" in PAGE
