"""The benchmark for GPUs runs, with tiny models on the CPU, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PARTS = [
    pytest.param("sdxl,optimizers", id="some"),
    pytest.param("sd15,sd15_four,sdxl_stored,sdxl_float8,computed,start,encoding,workers", id="the others"),
]


def run(module: str, folder: Path, *words: str) -> str:
    """What it prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--tiny", "--out", str(folder / "out"), *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "GPU_TESTS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
def test_every_part_gives_its_rows(tmp_path: Path, parts: str) -> None:
    words = ("--work", str(tmp_path / "work"), "--parts", parts, "--seconds", "1e6")
    run("benchmarks.gpu", tmp_path, *words)
    found = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))
    assert found["failed"] == {}
    assert set(found["parts"]) == set(parts.split(","))
    assert found["environment"]["tiny"] is True
    for rows in found["parts"].values():
        assert len(rows) >= 2
        for row in rows:
            numbers = [value for name, value in row.items() if name != "name"]
            assert numbers, row
            assert all(value > 0 for name, value in row.items() if name not in ("name", "data wait, %"))
    table = (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
    assert all(f"| {row['name']} |" in table for rows in found["parts"].values() for row in rows)
    run("benchmarks.gpu", tmp_path, *words, "--seconds", "0")  # all are there: none is begun
    assert json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8")) == found


@pytest.mark.slow
def test_one_command_writes_all_into_one_folder(tmp_path: Path) -> None:
    """Of the benchmark nothing is begun, for its time is over."""
    said = run("benchmarks.on_gpu", tmp_path, "benchmark", "--seconds", "-1")
    assert "benchmark.log: ended with 0" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["benchmark.log", "environment.txt"]
    assert "torch" in (tmp_path / "out" / "environment.txt").read_text(encoding="utf-8")
    assert "sd15: not started" in (tmp_path / "out" / "benchmark.log").read_text(encoding="utf-8")
