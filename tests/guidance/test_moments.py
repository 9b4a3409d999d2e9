"""Estimates of a run's memory against the bytes that torch's allocator really hands out in its steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.config.options import Options
from library.config.parser import parse
from library.data.caches.files import size_of
from library.guidance import verdict
from library.guidance.dry_run import _texts_size, synthetic_batch
from library.guidance.moments import TRAINING
from library.guidance.passes import Outlined
from library.models.opening import open_family
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


def test_samples_of_one_size_with_and_without_guidance(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is guided needs two predictions at once, whatever the others are."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox --w 64 --h 64\na cat --w 64 --h 64 --l 1\n", encoding="utf-8")
    plan = planned("--sample_prompts", str(prompts), "--sample_every_n_epochs", "1")
    estimates, asked = verdict.estimator(plan), []
    monkeypatch.setattr(estimates, "once", lambda key, *_: (asked.append(key), (0, 0))[1])
    estimates.needs(plan.options)
    assert ("predict", (64, 64), 2) in asked


@pytest.mark.parametrize("model", ["tiny_chroma", "tiny_z_image"])
def test_texts_are_as_long_as_the_longest_caption(model: str, request: pytest.FixtureRequest) -> None:
    family = open_family(str(request.getfixturevalue(model)))
    with family.outlined():
        outline = Outlined(family, Options.__new__(Options), torch.nn.Module(), on_gpu=False, caption="a fox " * 20)
        states = outline.texts(1)["hidden_states"]
    assert states.shape[1] > 40


def test_the_longest_caption(planned: Callable[..., Plan]) -> None:
    plan = planned()
    captions = [sample.caption for sample in plan.prepared.samples]
    assert len(verdict.estimator(plan)._caption) == max(map(len, captions)) > 0


def test_a_dry_runs_batch_has_the_size_of_its_bucket(planned: Callable[..., Plan], tmp_path: Path) -> None:
    """Most memory is needed by the many small images, not by the one large image."""
    data = tmp_path / "data.toml"
    subset = f'[[datasets.subsets]]\nimage_dir = "{tmp_path / "data" / "2_style"}"\n'
    sizes = ((256, 1), (192, 4))
    tables = (f"[[datasets]]\nresolution = {size}\nbatch_size = {batch}\n{subset}" for size, batch in sizes)
    data.write_text("".join(tables), encoding="utf-8")
    plan = planned("--train_data_dir=", "--dataset_config", str(data))
    run: Any = SimpleNamespace(data=SimpleNamespace(samples=plan.prepared.samples), family=plan.family)
    batch = synthetic_batch(plan, run)
    assert batch.moments is not None
    assert (batch.target_size, tuple(batch.moments[0].shape)) == ((192, 192), (4, 4, 48, 48))


def test_a_cache_of_texts_is_as_if_all_were_of_middle_length() -> None:
    family: Any = SimpleNamespace(encode_prompts=lambda texts: {"states": torch.zeros(1, len(texts[0]), 8)})
    assert _texts_size(family, ["a" * 9, "", "a" * 500]) == 3 * size_of({"states": torch.zeros(9, 8)})
    assert _texts_size(family, []) == 0
