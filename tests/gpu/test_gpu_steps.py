"""Steps on a GPU: how often the host waits for it, and which kernels compute attention."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from library.config.parser import parse
from library.run.build import build
from library.run.plan import make_plan
from library.training import loop
from library.training.run import Run
from tests.conftest import BASE, copy_images
from tests.gpu.conftest import REHEARSED

pytestmark = pytest.mark.gpu


@pytest.fixture
def ready(tmp_path: Path) -> Callable[..., Run]:
    """A run on six captioned images that is ready to start."""
    copy_images(tmp_path / "data" / "2_style")
    given = [
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(tmp_path / "data")),
        *("--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2", "--cache_latents"),
        *("--output_dir", str(tmp_path / "out"), "--network_dim", "4", "--max_train_steps", "20", "--seed", "1"),
        *("--no-loss_plot", "--no-report", "--max_data_loader_n_workers", "0"),
    ]
    return lambda *words: build(make_plan(parse([*given, *words])))


@pytest.mark.usefixtures("real_gpu")
@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), id="fp32"),
        pytest.param(("--mixed_precision", "bf16", "--optimizer_type", "CustomAdamW"), id="bf16, CustomAdamW"),
        pytest.param(("--mixed_precision", "bf16", "--no-cache_latents", "--min_snr_gamma", "5"), id="bf16, no caches"),
        pytest.param(("--mixed_precision", "bf16", "--fp8_base", "--noise_offset", "0.1"), id="fp8"),
        pytest.param(("--mixed_precision", "bf16", "--blocks_to_swap", "100%"), id="swapped blocks"),
        pytest.param(("--gradient_checkpointing", "--cpu_offload_checkpointing"), id="checkpoints on the host"),
    ],
)
def test_the_host_waits_once_in_a_step(ready: Callable[..., Run], words: tuple[str, ...]) -> None:
    """For the loss and the gradient's norm; copies to the GPU are queued. The first three steps compile and measure."""
    run = ready(*words)
    for item, number in zip(loop.step_batches(run), range(6), strict=False):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                loop.optimizer_step(run, item)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [warning for warning in said if "synchronizing CUDA operation" in str(warning.message)]
        if number >= 3:
            assert len(waits) == 1, [f"{warning.filename}:{warning.lineno}" for warning in waits]


class _Attention(TorchDispatchMode):
    """Counts the operations that attention was computed by."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product") or name == "_softmax":
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_attention_is_computed_by_fused_kernels(ready: Callable[..., Run], precision: str, deterministic: bool) -> None:
    """Without them the scores of all pairs of places would be stored: 4 GB a layer for SDXL at 1024 px, batch 4."""
    words = ("--mixed_precision", precision, *(() if deterministic or REHEARSED else ("--no-deterministic",)))
    run = ready(*words)
    item = next(loop.step_batches(run))
    with _Attention() as seen:
        loop.optimizer_step(run, item)
    print(f"{precision}, {'deterministic' if deterministic else 'any order'}: {dict(seen.counts)}")
    assert seen.counts["_softmax"] == 0
    forward = sum(count for name, count in seen.counts.items() if not name.endswith("backward"))
    backward = sum(count for name, count in seen.counts.items() if name.endswith("backward"))
    assert forward == backward > 0
