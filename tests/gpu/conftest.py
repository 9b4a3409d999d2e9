"""Tests on an NVIDIA GPU, marked `gpu`: `make test-gpu`, or `python3 -m pytest -m gpu tests/gpu`. See docs/gpu.md.

Without a GPU all of them are skipped. With GPU_TESTS=cpu in the environment, those that can run on the CPU in its
place, which shows that they work and nothing about GPUs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.gpu import WORKSPACE
from tests.conftest import copy_images, forget_accelerator, run_training

os.environ.setdefault(WORKSPACE, ":4096:8")  # before the first product of matrices in this process
REHEARSED = os.environ.get("GPU_TESTS") == "cpu"
GPU = torch.device("cpu" if REHEARSED else "cuda")


MISSING = not REHEARSED and not torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def a_gpu() -> None:
    if MISSING:
        pytest.skip("no GPU")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MISSING:
        terminalreporter.write_line("tests/gpu: skipped, there is no NVIDIA GPU that torch can use")


@pytest.fixture
def real_gpu() -> None:
    """For what has no meaning on a CPU."""
    if REHEARSED:
        pytest.skip("GPU_TESTS=cpu: only a GPU has this")


@dataclass(frozen=True)
class Trained:
    """What a run has left: the lines of its metrics, and its LoRA."""

    lines: list[dict[str, Any]]
    tensors: dict[str, Tensor]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines if "loss" in line and "epoch" in line]

    def has_the_bits_of(self, other: Trained) -> bool:
        """Weights and losses are the same to the last digit."""
        same = self.tensors.keys() == other.tensors.keys() and self.losses == other.losses
        return same and all(torch.equal(self.tensors[name], other.tensors[name]) for name in self.tensors)


def trained(folder: Path, name: str, *words: str, on_cpu: bool = False) -> Trained:
    """`run_training` of eight steps on `folder/data` with this output name, on the GPU unless `on_cpu`."""
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}):
        code = run_training(folder, "--max_train_steps", "8", "--output_name", name, *words)
    forget_accelerator()
    assert code == 0
    lines = (folder / "out" / f"{name}-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Trained([json.loads(line) for line in lines], load_file(folder / "out" / f"{name}.safetensors"))


@pytest.fixture
def on_gpu(tmp_path: Path) -> Callable[..., Trained]:
    """`trained` in `tmp_path`, on six captioned images."""
    copy_images(tmp_path / "data" / "2_style")
    return partial(trained, tmp_path)


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run that GPUs are compared with: fp32 on the CPU."""
    folder = tmp_path_factory.mktemp("on_cpu")
    copy_images(folder / "data" / "2_style")
    return trained(folder, "cpu", on_cpu=True)
