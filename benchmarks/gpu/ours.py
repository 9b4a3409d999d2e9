"""A run of this program on the device: the time and memory of a step, and the time spent waiting for data."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.models import Bench

if TYPE_CHECKING:
    from library.data.dataset import Batch
    from library.data.loader import PixelLoader
    from library.data.plan import PlannedBatch

CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs", "--cache_latents")


@dataclass(frozen=True)
class Measured:
    """`wait`: the share of the time in which the loop waits for its next batch."""

    seconds: float
    peak: int | None
    wait: float
    parameters: int


def words(bench: Bench, kind: str, output: Path, *, batch: int, steps: int, rank: int = 16) -> list[str]:
    """The command line that all runs share: bf16 and AdamW."""
    return [
        *("--pretrained_model_name_or_path", str(bench.model(kind)), "--train_data_dir", str(bench.images())),
        *("--caption_extension", ".txt", "--resolution", str(bench.resolution(kind)), "--output_dir", str(output)),
        *("--train_batch_size", str(batch), "--network_dim", str(rank), "--network_alpha", str(rank), "--seed", "42"),
        *("--mixed_precision", "bf16", "--learning_rate", "1e-4", "--max_train_steps", str(steps), "--overwrite"),
        *("--no-loss_plot", "--no-report"),
    ]


def train(bench: Bench, kind: str, *more: str, batch: int = 1, warmup: int = 4, steps: int) -> Measured:
    """Train `warmup` steps and `steps` more as the command line does, and measure the latter."""
    from accelerate.state import AcceleratorState

    from library.config.parser import parse
    from library.record import metrics
    from library.record.run_file import RunFile
    from library.run.about.summary import facts_of
    from library.run.build import build
    from library.run.plan import make_plan
    from library.run.watch import watch
    from library.training import loop

    AcceleratorState._reset_state(reset_partial_state=True)
    output = bench.folder / "out"
    plan = make_plan(parse([*words(bench, kind, output, batch=batch, steps=warmup + steps), *more]))
    run = build(plan)
    watch(plan, run, facts_of(plan, run), RunFile())
    waits: list[float] = []
    batches = run.data.batches

    def timed(plan: Sequence[PlannedBatch], *, epoch: int, loader: PixelLoader) -> Iterator[Batch]:
        found = batches(plan, epoch=epoch, loader=loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(found)
            except StopIteration:
                return
            waits.append(time.perf_counter() - start)
            yield batch

    run.data.batches = timed  # type: ignore[method-assign]
    bench.forget_peak()
    loop.train(run)
    bench.settled()
    peak = bench.peak()
    for hook in run.hooks:
        hook.end(run, stopped_by="an error", conclusion="")  # no pictures
    lines = [json.loads(line) for line in metrics.metrics_path(run.saves.last_file).read_text().splitlines()]
    at = {line["step"]: line["seconds"] for line in lines if "seconds" in line}
    taken = float(at[warmup + steps] - at[warmup])
    return Measured(
        seconds=taken / steps,
        peak=peak,
        wait=sum(waits[-steps:]) / taken,
        parameters=sum(parameter.numel() for parameter in run.parameters),
    )


def computed(bench: Bench, kind: str, *more: str, batch: int = 1) -> int:
    """The bytes of a step that the dry run computes for the same command line."""
    from accelerate.state import AcceleratorState

    from train_network import main

    AcceleratorState._reset_state(reset_partial_state=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([*words(bench, kind, bench.folder / "out", batch=batch, steps=1), *more, "--dry_run"]) == 0
    found = re.search(r"([\d.]+) (KiB|MiB|GiB)  a training step: ", said.getvalue())
    assert found is not None, said.getvalue()
    return int(float(found[1]) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[found[2]])
