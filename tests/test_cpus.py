"""How long torch's threads spin: settled before torch is imported, and only where the user has not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOWN = """
import train_network
assert train_network.main(["--no_such_option"]) == 2
import torch
"""


def libgomp_reads(**given: str) -> str:
    """What libgomp shows of its settings when the program loads it, with these variables."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", SHOWN],
        cwd=ROOT, env=ours | {"OMP_DISPLAY_ENV": "VERBOSE"} | given, capture_output=True, text=True, check=True,
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch does not compute with libgomp")
    return done.stderr


def test_threads_spin_briefly() -> None:
    assert "GOMP_SPINCOUNT = '10000'" in libgomp_reads()


def test_what_the_user_has_settled_is_kept() -> None:
    assert "GOMP_SPINCOUNT = '77'" in libgomp_reads(GOMP_SPINCOUNT="77")
    assert "GOMP_SPINCOUNT = '10000'" not in libgomp_reads(OMP_WAIT_POLICY="ACTIVE")
