"""Estimates of a run's memory against the bytes that torch's allocator really hands out in its steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.config.parser import parse
from library.guidance import verdict
from library.guidance.moments import TRAINING
from library.optimizers.create import state_bytes, tensor_bytes
from library.run.build import build
from library.run.plan import Plan, make_plan
from library.training import loop
from library.training.run import Run
from tests.conftest import BASE, copy_images

BF16 = ("--mixed_precision", "bf16")
CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs")
CONFIGURATIONS = {
    "fp32": (),
    "bf16": BF16,
    "checkpointing": (*BF16, "--gradient_checkpointing"),
    "unet only": (*BF16, *CACHED),
    "unet only, checkpointing": (*BF16, *CACHED, "--gradient_checkpointing"),
    "no caches": (*BF16, "--no-cache_latents"),
    "8-bit weights": (*BF16, "--fp8_base"),
    "8-bit states": (*BF16, "--optimizer_type", "AdamW8bit", "--network_dim", "64"),
    "CustomAdamW": ("--optimizer_type", "CustomAdamW", "--network_dim", "32"),
    "large batch": (*BF16, "--train_batch_size", "4", "--gradient_checkpointing"),
    "average": (*BF16, "--ema_decay", "0.99", "--network_dim", "64"),
    "full bf16": (*BF16, "--full_bf16", "--network_dim", "64"),
}


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Plan]:
    copy_images(tmp_path / "data" / "2_style", 4)
    given = [
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(tmp_path / "data")),
        *("--caption_extension", ".txt", "--resolution", "256", "--output_dir", str(tmp_path / "out")),
        *("--learning_rate", "1e-4", "--seed", "1", "--max_data_loader_n_workers", "0", "--cache_latents"),
        *("--no-monitoring", "--no-report", "--no-loss_plot"),
    ]
    return lambda *words: make_plan(parse([*given, *words]))


def allocated_in_a_step(run: Run) -> int:
    """The peak of the allocator's own record, over the second step: the first makes the optimizer's state."""
    steps = loop.step_batches(run)
    loop.optimizer_step(run, next(steps))
    item = next(steps)
    with torch.profiler.profile(profile_memory=True) as profile:
        loop.optimizer_step(run, item)
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def held(run: Run) -> int:
    """Bytes of what lies in memory between steps."""
    from library.training.hooks.ema import Ema

    ema = run.hook(Ema)
    parts = [
        sum(t.nbytes for m in run.family.components.loaded() for t in (*m.parameters(), *m.buffers())),
        sum(t.nbytes for t in (*run.network.parameters(), *run.network.buffers())),
        tensor_bytes(run.optimizer.optimizer.state),
        0 if ema is None else sum(t.nbytes for t in ema.average),
    ]
    return sum(parts)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.slow
def test_a_step_is_estimated_within_five_percent(planned: Callable[..., Plan], name: str) -> None:
    plan = planned(*CONFIGURATIONS[name])
    needs = verdict.estimator(plan).needs(plan.options)
    run = build(plan)
    peak = allocated_in_a_step(run)
    moment = needs.moment(TRAINING)
    assert needs.state == state_bytes(run.optimizer.optimizer)
    assert needs.trained == sum(parameter.numel() for parameter in run.parameters)
    standing = moment.total - moment.parts["gradients"] - moment.parts["activations"]
    assert standing == pytest.approx(held(run), rel=0.01)
    assert moment.total == pytest.approx(held(run) + peak, rel=0.05)
