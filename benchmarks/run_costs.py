"""The cost of a save, and the gain of a second process, on the quickstart's model and images.

    python -m benchmarks.run_costs saves        # a LoRA and a state of 4.5 million parameters
    python -m benchmarks.run_costs processes    # two processes of one thread, one of one, one of two; same global batch

Each is the command line itself. Seconds a step are those of the metrics file, without the first twenty steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest import mock

ROOT = Path(__file__).parents[1]
P = ParamSpec("P")
T = TypeVar("T")
QUICK = (
    *("--config_file", "configs/quickstart.toml", "--max_train_epochs", "0", "--compare_prompts", ""),
    *("--no-report", "--no-loss_plot", "--output_name", "run", "--train_batch_size", "8"),
)


def saves(optimizer: str) -> str:
    """A line of milliseconds and bytes, the median of 13 saves."""
    from library.record import saves as save
    from library.training import state
    from train_network import main

    times: dict[str, list[float]] = {"LoRA": [], "state": []}

    def timed(name: str, write: Callable[P, T]) -> Callable[P, T]:
        def call(*arguments: P.args, **settings: P.kwargs) -> T:
            start = time.perf_counter()
            written = write(*arguments, **settings)
            times[name].append(time.perf_counter() - start)
            return written

        return call

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(save, "save_network", timed("LoRA", save.save_network)),
        mock.patch.object(state, "write", timed("state", state.write)),
    ):
        every = ("--max_train_steps", "12", "--save_every_n_steps", "1", "--save_state", "--save_last_n_steps", "1")
        assert (
            main([*QUICK, *every, "--network_dim", "128", "--optimizer_type", optimizer, "--output_dir", folder]) == 0
        )
        size = sum(file.stat().st_size for file in Path(folder, "run-state").iterdir())
    lora, whole = (1e3 * statistics.median(times[name]) for name in ("LoRA", "state"))
    return f"| {optimizer} | {lora:.0f} | {whole:.0f} | {size / 1e6:.0f} |"


def seconds_a_step(launcher: tuple[str, ...], *words: str, threads: int) -> float:
    """Of 80 steps on 16 images each."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*launcher, "train_network.py", *QUICK, "--max_train_steps", "100", "--output_dir", folder, *words],
            cwd=ROOT,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)},
            check=True,
            capture_output=True,
        )
        lines = [json.loads(line) for line in Path(folder, "run-metrics.jsonl").read_text().splitlines()]
    at = {line["step"]: line["seconds"] for line in lines if "seconds" in line}
    return float(at[100] - at[20]) / 80


def processes() -> str:
    """A table with the speed of each beside that of one process of one thread, in the same run."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    alone = ("--gradient_accumulation_steps", "2")
    found = {
        "one process, one thread": seconds_a_step((sys.executable,), *alone, threads=1),
        "one process, two threads": seconds_a_step((sys.executable,), *alone, threads=2),
        "two processes, one thread each": seconds_a_step(torchrun, threads=1),
    }
    first = next(iter(found.values()))
    rows = [f"| {name} | {seconds:.3f} | {first / seconds:.2f} |" for name, seconds in found.items()]
    return "\n".join(["| | s a step | times as fast |", "|---|---|---|", *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("saves", "processes"))
    if parser.parse_args().what == "processes":
        print(processes())
    else:
        os.chdir(ROOT)
        print("| optimizer | LoRA, ms | state, ms | state, MB |\n|---|---|---|---|", flush=True)
        for chosen in ("AdamW", "CustomAdamW"):
            print(saves(chosen), flush=True)
