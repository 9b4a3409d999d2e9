"""A long run with everything on takes no more memory and no more time at its end than at its beginning."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.training import loop

MIB = 2**20


def resident() -> float:
    """MiB of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MIB


def reference() -> float:
    """CPU seconds of something that is always the same: they grow where neighbours use the same core."""
    product = weights = torch.eye(256)
    began = time.process_time()
    for _ in range(20):
        product = torch.relu(product @ weights)
    return time.process_time() - began


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.slow
@pytest.mark.parametrize(("steps", "settled", "every"), [(90, 45, "15"), (2000, 200, "25")])
def test_memory_and_time_stay(
    steps: int, settled: int, every: str, train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory: list[float] = []
    costs: list[float] = []
    one_step = loop.optimizer_step

    def watched(run: loop.Run, item: loop.StepBatches) -> loop.Step:
        began = time.process_time()
        loss = one_step(run, item)
        costs.append((time.process_time() - began) / reference())
        memory.append(resident())
        return loss

    monkeypatch.setattr(loop, "optimizer_step", watched)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("emoji of a cat --s 2 --w 64 --h 64\n", encoding="utf-8")
    words = (
        *("--max_train_steps", str(steps), "--optimizer_type", "CustomAdamW", "--network_dim", "32"),
        *("--use_adopt_stability", "--use_tam", "--use_grams", "--no-use_cautious"),
        *("--use_orthogonal_grad", "--use_alora"),
        *("--no-cache_latents", "--shuffle_caption", "--flip_aug", "--ema_decay", "0.99"),
        *("--on_divergence", "rollback"),
        *("--validation_split", "0.2", "--validate_every_n_steps", every, "--early_stopping_patience", "100"),
        *("--sample_prompts", str(prompts), "--sample_every_n_steps", every, "--logging_dir", str(tmp_path / "logs")),
        *("--save_every_n_steps", every, "--save_state", "--save_last_n_steps", "1", "--lr_scheduler", "cosine"),
        *("--loss_plot", "--report", "--compare_prompts", "a cat", "--compare_steps", "2"),
    )
    assert train(*words) == 0
    assert len(memory) == steps
    grown = max(memory[settled:]) - max(memory[settled // 2 : settled])
    third = steps // 3
    early, late = statistics.median(costs[5:third]), statistics.median(costs[-third:])
    print(f"{steps} steps: {grown:.1f} MiB more after step {settled}; at the end {late / early:.2f} times the time")
    assert grown <= 20
    assert late <= 1.25 * early  # of the median step, in units of `reference`
