"""The benchmark's worker makes steps of the quickstart's model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.thread_waiting import Worker


@pytest.mark.slow
def test_a_worker_times_its_steps(tmp_path: Path) -> None:
    worker = Worker("quickstart", tmp_path, {"OMP_NUM_THREADS": "1"})
    try:
        assert 0 < worker.time() < 600
    finally:
        worker.end()
