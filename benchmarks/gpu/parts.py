"""The measurements, the most important first. A part yields rows: a name, and numbers by column."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import ours
from benchmarks.gpu.models import Bench
from benchmarks.gpu.peers import Peer, seconds
from library import gpu

ROOT = Path(__file__).parents[2]
Row = dict[str, str | float]  # a name, and figures by column
CHECKPOINTED = ("--gradient_checkpointing",)
OPTIMIZERS = (  # of benchmarks.optimizer_step; ours are compiled on a GPU, but for the last
    *("AdamW (torch, fused)", "AdamW8bit (bitsandbytes)", "**CustomAdamW, defaults, 32-bit** (ours)"),
    *("**CustomAdamW, defaults, 8-bit** (ours)", "CustomAdamW, defaults, 8-bit, plain torch"),
)


def training(bench: Bench, kind: str, *, batch: int, checkpointing: bool, steps: int) -> Iterator[Row]:
    """Our step, with algorithms that give the same bits and with any, beside a bare loop's and peft's."""
    size = setting(bench, kind, batch=batch, checkpointing=checkpointing)
    more = (*ours.CACHED, *(CHECKPOINTED if checkpointing else ()))
    count, found = bench.steps(steps), {}
    for name, words in (("ours", ()), ("ours, --no-deterministic", ("--no-deterministic",))):
        run = ours.train(bench, kind, *more, *words, batch=batch, steps=count)
        found[name] = run.seconds
        yield row(f"{size}: {name}", run.seconds, batch=batch, run=run)
        gc.collect()
    gpu.settle(deterministic=False, allow_tf32=False)
    for name in ("bare", "peft"):
        peer = Peer(bench, kind, adapters=name, batch=batch, checkpointing=checkpointing)
        assert sum(parameter.numel() for parameter in peer.parameters) == run.parameters, "other layers are trained"
        bench.forget_peak()
        taken = seconds(bench, peer.step, warmup=bench.steps(4), steps=count)
        text = {"bare": "bare loop", "peft": "the same loop with peft"}[name]
        numbers = row(f"{size}: {text}", taken, batch=batch, peak=bench.peak())
        numbers["ours takes"] = found["ours"] / taken
        yield numbers
        del peer
        gc.collect()


def setting(bench: Bench, kind: str, *, batch: int = 1, checkpointing: bool = False) -> str:
    return f"{kind}, {bench.resolution(kind)} px, batch {batch}" + ", checkpointing" * checkpointing


def row(name: str, taken: float, *, batch: int, run: ours.Measured | None = None, peak: int | None = None) -> Row:
    numbers: Row = {"name": name, "ms": taken * 1e3, "a second": batch / taken}
    if run is not None:
        peak = run.peak
        numbers["data wait, %"] = run.wait * 100
    if peak is not None:
        numbers["peak, GiB"] = peak / 2**30
    return numbers


def sd15(bench: Bench) -> Iterator[Row]:
    yield from training(bench, "sd15", batch=1, checkpointing=False, steps=30)


def sd15_four(bench: Bench) -> Iterator[Row]:
    yield from training(bench, "sd15", batch=4, checkpointing=False, steps=15)


def sdxl(bench: Bench) -> Iterator[Row]:
    yield from training(bench, "sdxl", batch=1, checkpointing=True, steps=12)


def sdxl_stored(bench: Bench) -> Iterator[Row]:
    yield from training(bench, "sdxl", batch=1, checkpointing=False, steps=12)


def sdxl_float8(bench: Bench) -> Iterator[Row]:
    """8-bit weights need half the memory; this measures the cost of converting them."""
    for more in ((), CHECKPOINTED):
        run = ours.train(bench, "sdxl", *ours.CACHED, "--fp8_base", *more, steps=bench.steps(10))
        yield row(
            f"{setting(bench, 'sdxl', checkpointing=bool(more))}: ours, --fp8_base", run.seconds, batch=1, run=run
        )
        gc.collect()


def computed(bench: Bench) -> Iterator[Row]:
    """The dry run's estimates, in the rows of the peaks."""
    for kind, batch, float8, more in (
        ("sdxl", 1, False, CHECKPOINTED),
        ("sdxl", 1, False, ()),
        ("sd15", 4, False, ()),
        ("sdxl", 1, True, ()),
    ):
        words = (*ours.CACHED, *more, *(("--fp8_base",) if float8 else ()))
        size = setting(bench, kind, batch=batch, checkpointing=bool(more))
        gib = ours.computed(bench, kind, *words, batch=batch) / 2**30
        yield {"name": f"{size}: ours{', --fp8_base' if float8 else ''}", "computed, GiB": gib}
        gc.collect()


def optimizers(bench: Bench) -> Iterator[Row]:
    """A step of the optimizer on the 384 tensors of SD 1.5's UNet; the first step compiles, if the step is compiled."""
    from benchmarks.optimizer_step import contenders, lora_parameters, state_bytes

    chosen = {name: make for name, make in contenders().items() if name in OPTIMIZERS}
    for rank in (2,) if bench.tiny else (16, 64):
        for name, make in chosen.items():
            named = []
            for key, parameter in lora_parameters(rank):
                moved = torch.nn.Parameter(parameter.detach().to(bench.device))
                assert parameter.grad is not None
                moved.grad = parameter.grad.to(bench.device)
                named.append((key, moved))
            optimizer = make(named)
            first = seconds(bench, optimizer.step, warmup=0, steps=1)
            apart = [seconds(bench, optimizer.step, warmup=0, steps=1) for _ in range(bench.steps(20) + 2)][2:]
            numbers = sum(parameter.numel() for _, parameter in named)
            yield {
                "name": f"optimizer's step, rank {rank}: {name}",
                "ms": statistics.median(apart) * 1e3,
                "first, s": first,
                "state, bytes a number": state_bytes(optimizer) / numbers,
            }
            del optimizer, named
            gc.collect()


def start(bench: Bench) -> Iterator[Row]:
    """From the start of the process to the first step's line in the metrics: imports, loading, eight images encoded."""
    for kind in ("sd15", "sdxl"):
        with tempfile.TemporaryDirectory() as folder:
            command = ours.words(bench, kind, Path(folder), batch=1, steps=100_000)
            command += [*ours.CACHED, *CHECKPOINTED, "--output_name", "run"]
            environment = {**os.environ, "PYTHONPATH": path()}
            began = time.perf_counter()
            called, null = [sys.executable, "train_network.py", *command], subprocess.DEVNULL
            with subprocess.Popen(called, env=environment, cwd=ROOT, stdout=null, stderr=null) as process:
                try:
                    metrics = Path(folder, "run-metrics.jsonl")
                    while not (metrics.exists() and '"loss":' in metrics.read_text()):
                        assert process.poll() is None, "the run ended before its first step"
                        assert time.perf_counter() - began < 120, "no step within two minutes"
                        time.sleep(0.02)
                    taken = time.perf_counter() - began
                finally:
                    process.kill()
        yield {"name": f"{kind}: start to the end of the first step", "s": taken}


def path() -> str:
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def encoding(bench: Bench) -> Iterator[Row]:
    """Images into latents in bf16: decoding, copying and the VAE together, and the VAE alone on one batch."""
    from library.config.parser import parse
    from library.data.dataset import TrainingData
    from library.run.plan import make_plan

    for kind in ("sd15", "sdxl"):
        batch = 2 if bench.tiny else 4
        plan = make_plan(parse(ours.words(bench, kind, bench.folder / "out", batch=1, steps=1)))
        plan.family.components.load("vae", torch.bfloat16, bench.device)
        data = TrainingData(plan.prepared, seed=0)
        size = bench.resolution(kind)
        pixels = torch.zeros(batch, 3, size, size, device=bench.device)

        encode = plan.family.encode_images
        alone = seconds(bench, partial(encode, pixels), warmup=2, steps=bench.steps(8)) / batch
        cache = partial(data.cache_latents, encode, batch_size=batch)
        whole = seconds(bench, cache, warmup=1, steps=1) / len(plan.prepared.samples)
        name = f"{kind}, {size} px: images into latents, {batch} at a time"
        yield {"name": name, "a second": 1 / whole, "the VAE alone": 1 / alone}
        gc.collect()


def workers(bench: Bench) -> Iterator[Row]:
    """Without caches: images are decoded by workers and encoded in every step."""
    uncached = ("--no-cache_latents", "--no-cache_text_encoder_outputs", "--flip_aug")
    for count in (0, 4):
        more = ("--max_data_loader_n_workers", str(count), *uncached)
        run = ours.train(bench, "sd15", *more, batch=4, steps=bench.steps(6), warmup=2)
        yield row(f"sd15, batch 4, no caches, {count} workers: ours", run.seconds, batch=4, run=run)
        gc.collect()


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd15_four": sd15_four,
    "sdxl_stored": sdxl_stored,
    "sdxl_float8": sdxl_float8,
    "optimizers": optimizers,
    "computed": computed,
    "start": start,
    "encoding": encoding,
    "workers": workers,
}
