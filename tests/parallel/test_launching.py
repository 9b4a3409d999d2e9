"""What accelerate's launcher may ask for, and the configurations for it that the project brings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import InitProcessGroupKwargs

from library import job, processes
from library.run import start
from library.training import loop
from tests.conftest import PATIENCE

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))

Train = Callable[..., int]


def launch(what: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Two processes on the CPU, as the README says; `what` happens to them in the third step."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / "multi_gpu.yaml")]
    words = ["--pretrained_model_name_or_path", str(ROOT / "quickstart" / "base"), "--resolution", "64", "--seed", "1"]
    words += ["--train_data_dir", str(folder / "data"), "--caption_extension", ".txt", "--train_batch_size", "1"]
    words += ["--output_dir", str(folder / "out"), "--output_name", "test", "--network_dim", "4", "--no-loss_plot"]
    words += ["--max_train_steps", "6", "--learning_rate", "1e-3", "--max_data_loader_n_workers", "0", *more]
    return subprocess.run(
        [*command, str(ROOT / "tests" / "parallel" / "launched.py"), what, *words],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.slow
def test_a_signal_to_all_processes_costs_nothing(image_folder: Path, tmp_path: Path) -> None:
    """The launcher ends all as soon as one has ended: the others must wait until the first has saved."""
    done = launch("signals", tmp_path)
    assert done.returncode == 1  # of the launcher, whatever its processes end with
    assert "process 1 of 2 ends with 130" in done.stdout
    assert (tmp_path / "out" / "test-step00000003-state" / "state.pt").is_file(), done.stderr
    assert (tmp_path / "out" / "test-report.html").is_file()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_with_a_sentence(image_folder: Path, tmp_path: Path) -> None:
    done = launch("killed", tmp_path, "--save_every_n_steps", "2", "--save_state")
    assert done.returncode == 1
    assert done.stderr.count("error: another process of this run has ended") == 1
    assert "[rank" not in done.stderr  # no traceback of ours
    assert (tmp_path / "out" / "test-step00000002-state" / "state.pt").is_file()


def test_what_all_processes_find_is_said_by_the_first(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends the second one while it waits; without a launcher both are heard."""
    said: list[str] = []

    def wait(seconds: float) -> None:
        assert seconds >= 2
        said.append(capsys.readouterr().err)

    monkeypatch.setattr(processes.time, "sleep", wait)
    monkeypatch.setenv("RANK", "1")
    assert train("--network_dim", "many") == 2
    assert said == [""]
    assert "--network_dim" in capsys.readouterr().err


def test_one_process_draws_the_contact_sheet(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "1")
    assert train("--debug_dataset") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("message", "world", "code"),
    [
        ("[/build/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer.", "2", 1),
        ("[/build/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer.", "1", None),
        ("mat1 and mat2 shapes cannot be multiplied", "2", None),
    ],
)
def test_the_loss_of_another_process_is_told_apart_from_faults(
    message: str,
    world: str,
    code: int | None,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object, **__: object) -> int:
        raise RuntimeError(message)

    monkeypatch.setattr(job, "run", fails)
    monkeypatch.setenv("WORLD_SIZE", world)
    if code is None:
        with pytest.raises(RuntimeError, match=r"mat1|gloo"):
            train()
        return
    assert train() == code
    assert "error: another process of this run has ended" in capsys.readouterr().err


def test_the_environment_does_not_divide_the_losses(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's launcher sets this variable for DeepSpeed, and accelerate divides by it of itself."""
    seen: list[int] = []
    step = loop.optimizer_step

    def watched(run: loop.Run, item: loop.StepBatches) -> loop.Step:
        seen.append(run.accelerator.gradient_accumulation_steps)
        return step(run, item)

    monkeypatch.setattr(loop, "optimizer_step", watched)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert train("--max_train_steps", "1") == 0
    assert seen == [1]


@pytest.mark.slow
def test_how_long_processes_wait_for_each_other(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that draws many samples keeps the others waiting, ten minutes at most with NCCL's default."""
    seen = []

    class Watched(Accelerator):
        def __init__(self, *, kwargs_handlers: list[InitProcessGroupKwargs], **more: object) -> None:
            seen.extend(handler.timeout for handler in kwargs_handlers)
            super().__init__(kwargs_handlers=kwargs_handlers, **more)

    monkeypatch.setattr(start, "Accelerator", Watched)
    assert train("--dry_run", "--ddp_timeout", "45") == 0
    assert seen == [timedelta(minutes=45)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_its_configurations(file: Path) -> None:
    config = load_config_from_file(str(file))
    kind = {"multi_gpu": "MULTI_GPU", "multi_node": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED"}[
        file.stem
    ]
    assert str(config.distributed_type).endswith(kind)
    assert config.num_processes > 1
    assert not config.use_cpu
    assert "Not run on" in file.read_text(encoding="utf-8")
    assert yaml.safe_load(file.read_text(encoding="utf-8")).keys() <= vars(config).keys()


@pytest.mark.parametrize(
    ("variable", "words", "said"),
    [
        ("MEGATRON_LM", (), "accelerate's configuration asks for Megatron-LM: it is for language models"),
        ("FSDP", ("--fp8_base", "--mixed_precision", "bf16"), "--fp8_base with FSDP: only weights of one precision"),
        ("FSDP", ("--compare_prompts", "a cat"), "--compare_prompts with FSDP: one process renders"),
        (
            "FSDP",
            ("--network_module", "lycoris.kohya"),
            "--network_module lycoris.kohya with FSDP: only this program's kinds",
        ),
    ],
)
def test_what_cannot_be(
    variable: str,
    words: tuple[str, ...],
    said: str,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    assert train(*words) == 2
    assert said in capsys.readouterr().err


def test_one_process_shares_with_nobody(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train("--max_train_steps", "1") == 0
    assert "FSDP with one process" in capsys.readouterr().err
