"""Whole processes on a GPU: launchers and NCCL, sharing, SIGTERM, memory that runs out."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.out_of_memory import LESS_MEMORY
from tests.conftest import BASE, ROOT, copy_images, run_training
from tests.gpu.conftest import REHEARSED, Trained, trained

pytestmark = pytest.mark.gpu
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
ENVIRONMENT = os.environ | ({"ACCELERATE_USE_CPU": "true"} if REHEARSED else {}) | {"PYTHONPATH": str(ROOT)}
ENVIRONMENT |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def words(folder: Path, name: str) -> list[str]:
    """`train_network.py` as `run_training` calls it."""
    return [
        *("train_network.py", "--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(folder / "data")),
        *("--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2", "--seed", "1"),
        *("--output_dir", str(folder / "out"), "--output_name", name, "--network_dim", "4", "--network_alpha", "2"),
        *("--learning_rate", "1e-3", "--max_train_steps", "8", "--no-loss_plot", "--no-report", "--cache_latents"),
        *("--max_data_loader_n_workers", "0"),
    ]


def finished(*command: str) -> str:
    """What it prints; it must end well."""
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    """A folder, and a run in this process without any launcher."""
    folder = tmp_path_factory.mktemp("processes")
    copy_images(folder / "data" / "2_style")
    return folder, trained(folder, "alone")


@pytest.mark.parametrize("kind", ["multi_gpu", "fsdp"])
def test_accelerates_launcher_with_one_gpu(alone: tuple[Path, Trained], kind: str) -> None:
    """With NCCL the same bits as without a launcher; FSDP says that there is nobody to share with."""
    folder, expected = alone
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--config_file")
    said = finished(*launcher, str(ROOT / "configs" / "accelerate" / f"{kind}.yaml"), *words(folder, kind))
    assert ("FSDP with one process" in said) == (kind == "fsdp")
    tensors = load_file(folder / "out" / f"{kind}.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.tensors.items())


@pytest.mark.parametrize("what", ["fsdp", "zero"])
def test_sharing_with_nobody_changes_nothing(alone: tuple[Path, Trained], what: str) -> None:
    """The collective operations run, over one process. ZeRO-2 keeps one vector: its norm is summed in another order."""
    if what == "zero" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder, _ = alone
    for name in ("plain", what):
        if not (folder / f"{name}.json").exists():
            finished(*TORCHRUN, str(ROOT / "tests" / "gpu" / "one_process.py"), name, str(folder))
    plain, shared = (json.loads((folder / f"{name}.json").read_text()) for name in ("plain", what))
    assert plain["backend"] == ("gloo" if REHEARSED else "nccl")
    assert shared["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert shared["weights"] == pytest.approx(plain["weights"], rel=1e-6)


def test_sigterm_saves_and_ends(alone: tuple[Path, Trained]) -> None:
    folder, _ = alone
    metrics = folder / "out" / "stopped-metrics.jsonl"
    command = [sys.executable, *words(folder, "stopped"), "--max_train_steps", "100000", "--mixed_precision", "bf16"]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 3, process)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopping after this step" in said
    (saved,) = (folder / "out").glob("stopped-step*.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(saved).values())


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()[-3000:]
        assert time.monotonic() < end, "nothing was trained within two minutes"
        time.sleep(0.1)


@pytest.fixture
def a_gibibyte() -> Iterator[None]:
    """All of the GPU's memory that this process may have."""
    torch.cuda.empty_cache()
    share = (torch.cuda.memory_reserved() + 2**30) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("real_gpu", "a_gibibyte")
def test_memory_that_runs_out_is_an_error_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve images of 512 px need 7.5 GiB; the process can go on with something smaller."""
    copy_images(tmp_path / "data" / "2_style")
    assert run_training(tmp_path, "--resolution", "512", "--train_batch_size", "12") == 2
    error = capsys.readouterr().err
    assert "error: step 1: the GPU's memory is too small: Tried to allocate" in error
    assert f"Nothing was trained yet, and nothing was written. {LESS_MEMORY}" in error
    assert "Traceback" not in error
    trained(tmp_path, "smaller")
