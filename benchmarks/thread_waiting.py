"""Ways of torch's threads to wait for each other: a step alone on the machine and beside one busy process.

    python -m benchmarks.thread_waiting [--rounds 10] [--folder output/sd15]

A thread that has done its share of an operation can spin until the others are done, or sleep. Spinning saves
microseconds where each thread has a core, and wastes time slices where another program wants it. Every way of waiting
has a process of its own, because OpenMP reads the environment once; they take turns. Each is measured on the
quickstart's base at 64 px (short operations) and on SD 1.5 at 256 px, UNet only, cached text (long ones; the model is
made at the first call, 4.3 GB).
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
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

from benchmarks.common import quartiles, sd15_folder
from benchmarks.step_time import image_folder, words
from library.progress import bar

ROOT = Path(__file__).parents[1]
WAYS: dict[str, dict[str, str]] = {  # the first is the one that the others are compared with
    "as libgomp has it": {},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1,000 times": {"GOMP_SPINCOUNT": "1000"},
    "spin 10,000 times": {"GOMP_SPINCOUNT": "10000"},
    "spin 100,000 times": {"GOMP_SPINCOUNT": "100000"},
}
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(1000000))"
CALLS = {"quickstart": 4, "sd15": 1}  # steps that are timed together


class Worker:
    """A run in a process of its own; `time` has it make its steps and returns the seconds a step took."""

    def __init__(self, model: str, folder: Path, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.thread_waiting", "--worker", model, "--folder", str(folder)]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=env | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.time()  # the first steps are slower

    def time(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError("a worker has ended; its messages are above")

    def end(self) -> None:
        with self._process:  # which closes its streams and waits
            self._process.kill()


def work(model: str, folder: Path) -> None:
    """The worker: builds a run, then makes steps on request."""

    from library.config.parser import parse
    from library.run.build import build
    from library.run.plan import make_plan
    from library.training import loop

    with tempfile.TemporaryDirectory() as temporary:
        if model == "sd15":
            command = words(sd15_folder(folder), image_folder(Path(temporary) / "data"), Path(temporary), 256)
            command += ["--network_train_unet_only", "--cache_text_encoder_outputs"]
        else:
            images = image_folder(Path(temporary) / "data")
            command = words(ROOT / "quickstart" / "base", images, Path(temporary), 64)
            command += ["--train_batch_size", "4"]
        run = build(make_plan(parse(command)))
        steps = cycle([item for item, _ in zip(loop.step_batches(run), range(8), strict=False)])
        for _ in sys.stdin:
            start = time.perf_counter()
            for _ in range(CALLS[model]):
                loop.optimizer_step(run, next(steps))
            print("seconds", (time.perf_counter() - start) / CALLS[model], flush=True)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Programs that always want a core."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("output/sd15"))
    parser.add_argument("--model", choices=CALLS, action="append")
    parser.add_argument("--way", choices=WAYS, action="append", help="default: all, which need 25 GB with sd15")
    parser.add_argument("--worker", choices=CALLS, help=argparse.SUPPRESS)
    parser.add_argument("--beside", type=int, choices=(0, 1), action="append", help="busy processes (default: both)")
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.folder.resolve())
        return
    print("| model | beside it | way of waiting | step, s | ratio to the first, median (quartiles) |")
    print("|---|---|---|---|---|")
    for model in options.model or CALLS:
        workers = {way: Worker(model, options.folder.resolve(), WAYS[way]) for way in options.way or WAYS}
        for others in options.beside or (0, 1):
            with busy(others):
                times = measure(workers, options.rounds, f"{model}, {others} busy")
            report(model, others, times)
        for worker in workers.values():
            worker.end()


def measure(workers: dict[str, Worker], rounds: int, name: str) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {way: [] for way in workers}
    for number in bar(range(rounds), desc=name, unit="round"):
        for way in list(workers)[:: 1 if number % 2 else -1]:
            times[way].append(workers[way].time())
    return times


def report(model: str, others: int, times: dict[str, list[float]]) -> None:
    first = next(iter(times.values()))
    for way, seconds in times.items():
        low, middle, high = quartiles([a / b for a, b in zip(seconds, first, strict=True)])
        beside = f"{others} busy process" if others else "nothing"
        median = statistics.median(seconds)
        print(f"| {model} | {beside} | {way} | {median:.3f} | {middle:.2f} ({low:.2f}–{high:.2f}) |", flush=True)
    print(json.dumps({"model": model, "busy": others, "seconds": times}), file=sys.stderr)


if __name__ == "__main__":
    main()
