"""Estimates of memory against the peak that the GPU's allocator reports. Not run yet on a machine with a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.config.parser import parse
from library.guidance import verdict
from library.guidance.moments import TRAINING
from library.run.build import build
from library.run.plan import make_plan
from library.training import loop
from tests.conftest import BASE, copy_images

pytestmark = pytest.mark.gpu

BF16 = ("--mixed_precision", "bf16")


@pytest.mark.usefixtures("real_gpu")
@pytest.mark.parametrize(
    "words",
    [(), BF16, (*BF16, "--gradient_checkpointing"), (*BF16, "--base_format", "fp8"), (*BF16, "--base_format", "nf4")],
    ids=["fp32", "bf16", "checkpointing", "fp8", "nf4"],
)
def test_the_peak_of_a_step(tmp_path: Path, words: tuple[str, ...]) -> None:
    copy_images(tmp_path / "data" / "2_style", 4)
    given = [
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(tmp_path / "data")),
        *("--caption_extension", ".txt", "--resolution", "512", "--output_dir", str(tmp_path / "out")),
        *("--learning_rate", "1e-4", "--seed", "1", "--max_data_loader_n_workers", "0", "--cache_latents"),
        *("--train_batch_size", "4", "--no-monitoring", "--no-report", "--no-loss_plot"),
    ]
    plan = make_plan(parse([*given, *words]))
    estimate = verdict.estimator(plan).needs(plan.options).moment(TRAINING).total
    before = torch.cuda.memory_allocated()
    run = build(plan)
    steps = loop.step_batches(run)
    loop.optimizer_step(run, next(steps))
    torch.cuda.reset_peak_memory_stats()
    loop.optimizer_step(run, next(steps))
    assert estimate == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.05)
