"""What watching a run costs in a step at the true SD 1.5 size: the time in the monitor, and its share of the step.

    python -m benchmarks.monitoring_cost [--steps 12] [--resolution 256] [--folder output/sd15]

One image, fp32, cached latents, rank 16 on the UNet's 192 modules and the text encoder's 72. Every step is measured
here; training measures one in ten and only tells the numbers of the others. The model has random weights and is made at
the first call (4.3 GB).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from benchmarks.common import sd15_folder
from benchmarks.step_time import image_folder, words
from library.config.options.monitoring import EVERY_N_STEPS

if TYPE_CHECKING:
    from library.record.run_file import RunFile

P = ParamSpec("P")
T = TypeVar("T")
PARTS = ("batch", "before_step", "after_step", "report")


class Stopwatch:
    """Adds up the time in the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timing(self, function: Callable[P, T]) -> Callable[P, T]:
        def timed(*words: P.args, **more: P.kwargs) -> T:
            began = time.perf_counter()
            try:
                return function(*words, **more)
            finally:
                self.seconds += time.perf_counter() - began

        return timed

    def take(self) -> float:
        taken, self.seconds = self.seconds, 0.0
        return taken


def measure(command: list[str], steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step with everything, and of these the monitor's. The run's record is kept up meanwhile."""
    from library.record.run_file import RunFile

    with RunFile() as record:
        return _measure(command, steps, record)


def _measure(command: list[str], steps: int, record: RunFile) -> tuple[list[float], list[float]]:
    from library.config.parser import parse
    from library.run.about.summary import facts_of
    from library.run.build import build
    from library.run.plan import make_plan
    from library.run.watch import watch
    from library.training import loop
    from library.training.hooks.monitor import Monitor

    plan = make_plan(parse(command))
    run, stopwatch = build(plan, record), Stopwatch()
    watch(plan, run, facts_of(plan, run), record)
    monitor = run.hook(Monitor)
    assert monitor is not None
    monitor.before_training(run)
    for part in PARTS:
        setattr(monitor, part, stopwatch.timing(getattr(monitor, part)))
    items = cycle(list(islice(loop.step_batches(run), 1, 9)))  # the first step is measured in any case
    whole, ours = [], []
    for _ in range(steps + 2):
        began, item = time.perf_counter(), next(items)
        step = loop.optimizer_step(run, item)
        run.losses.add(step.loss)
        monitor.report(run, step)
        whole.append(time.perf_counter() - began)
        ours.append(stopwatch.take())
    return whole[2:], ours[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("output/sd15"))
    options = parser.parse_args()
    model = sd15_folder(options.folder)
    print("| measured | in the monitor, ms | step, s | share of the step |\n|---|---|---|---|")
    shares = {}
    for every, name in ((1, "every step"), (10**6, "no step")):
        with tempfile.TemporaryDirectory() as temporary:
            common = words(model, image_folder(Path(temporary) / "data"), Path(temporary), options.resolution)
            command = [*common, "--network_dim", "16", "--network_alpha", "16", "--monitor_every_n_steps", str(every)]
            whole, ours = measure(command, options.steps)
        step, cost = statistics.median(whole), statistics.median(ours)
        shares[every] = cost / step
        print(f"| {name} | {cost * 1e3:.2f} | {step:.2f} | {cost / step:.3%} |", flush=True)
    usual = (shares[1] + (EVERY_N_STEPS - 1) * shares[10**6]) / EVERY_N_STEPS
    print(f"| every {EVERY_N_STEPS}th step, the default | | | {usual:.3%} |")


if __name__ == "__main__":
    main()
