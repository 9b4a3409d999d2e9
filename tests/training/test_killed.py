"""kill -9 at any moment: what was saved is whole, and the run goes on from it with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.quick import slow


@pytest.mark.skipif(not hasattr(os, "fork"), reason="every try is a fork")
@pytest.mark.parametrize(
    ("tries", "inside_saves", "seed"),
    [(2, 1, 0), slow((8, 3, 0)), *(slow((10, 3, seed)) for seed in range(1, 6))],  # of the slow ones 58
)
def test_nothing_is_lost(
    tries: int, inside_saves: int, seed: int, tmp_path: Path, image_folder: Path, train: Callable[..., int]
) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path), str(tries), str(seed)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:] + (tmp_path / "log.txt").read_text()[-2000:]
    report = json.loads(done.stdout)
    print(report)
    assert report["tries"] == tries
    assert report["inside_a_save"] >= inside_saves
    step = report["reached"][-1]
    assert step > 0
    unbroken = ("--network_dim", "16", "--network_alpha", "1", "--train_batch_size", "1", "--shuffle_caption")
    assert train(*unbroken, "--max_train_steps", str(step), "--output_name", "unbroken") == 0
    expected = load_file(tmp_path / "out" / "unbroken.safetensors")
    found = load_file(tmp_path / "out" / f"test-step{step:08d}.safetensors")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
