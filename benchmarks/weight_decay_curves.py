"""Does a weight decay that falls pay? LoRAs of the quickstart's style over 3,000 steps, with each curve beside a
constant weight decay, judged on images that no training saw.

    python -m benchmarks.weight_decay_curves              # runs what is missing (hours on two cores), reports
    python -m benchmarks.weight_decay_curves --report     # the table of the finished runs
    python -m benchmarks.weight_decay_curves --only factor --seeds 2

The weight decay is 1 and the rate 1e-3 without a schedule, so that a constant one takes 95 % of what was learnt first
away again in a run: with usual numbers no curve could make a difference. Runs of one seed are pairs, and the losses
are taken as benchmarks/study.py says. Each finished run is one row of benchmarks/results/weight_decay_curves.csv, so an
interrupted study continues where it stopped. One process per core, one thread each.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from benchmarks import rows as files
from benchmarks import study

RESULTS = study.ROOT / "benchmarks" / "results" / "weight_decay_curves.csv"
STEPS, BATCH_SIZE, RATE, WEIGHT_DECAY = 3000, 1, 1e-3, 1.0
SHARED = (
    *("--network_module", "networks.lora", "--network_dim", "16", "--network_alpha", "16"),
    *("--network_train_unet_only", "--optimizer_type", "AdamW", "--lr_scheduler", "constant_with_warmup"),
)


@dataclass(frozen=True)
class Way:
    """A weight decay and its curve. `more`: words of the command line."""

    name: str
    more: tuple[str, ...] = ()
    weight_decay: float = WEIGHT_DECAY


@dataclass(frozen=True)
class Row:
    """One finished run: the losses on held-out images."""

    way: str
    seed: int
    steps: int
    rate: float
    validation: float
    report: float
    seconds: float


Key = tuple[str, int]


def ways() -> list[Way]:
    """The first is what the others are compared with. Then the curves that docs/weight-decay.md names, and the default
    one with each factor."""

    def curve(name: str, transition: int, factor: float, least: float) -> Way:
        numbers = {"transition_steps": transition, "decay_factor": factor, "min_ratio": least}
        more = [word for option, value in numbers.items() for word in (f"--wd_{option}", f"{value:g}")]
        return Way(name, ("--dynamic_weight_decay", *more))

    return [
        Way("constant"),
        Way("none", weight_decay=0.0),
        curve("default: 1000, 0.7, 0.1", 1000, 0.7, 0.1),
        curve("aggressive: 800, 0.6, 0.15", 800, 0.6, 0.15),
        curve("conservative: 1500, 0.8, 0.05", 1500, 0.8, 0.05),
        Way("adaptive", ("--dynamic_weight_decay", "--wd_schedule", "adaptive")),
        *(curve(f"factor {factor:g}", 1000, factor, 0.1) for factor in (0.5, 0.6, 0.8, 0.9)),
    ]


def run(way: Way, seed: int) -> Row:
    """One training run."""
    words = (*SHARED, "--weight_decay", f"{way.weight_decay:g}", *way.more)
    found = study.train_and_judge(study.STYLE, RATE, seed, *words, steps=STEPS, batch_size=BATCH_SIZE)
    return Row(way.name, seed, STEPS, RATE, found.validation, found.report, found.seconds)


def read_rows() -> dict[Key, Row]:
    """The finished runs with these settings."""
    found = [row for row in files.read(RESULTS, Row) if (row.steps, row.rate) == (STEPS, RATE)]
    return {(row.way, row.seed): row for row in found}


def run_missing(wanted: Sequence[Way], rows: Mapping[Key, Row], *, seeds: int, workers: int) -> None:
    """All ways of a seed before the next seed. Each finished run is stored at once."""
    from library.progress import progress

    todo = [(way, seed) for seed in range(1, seeds + 1) for way in wanted if (way.name, seed) not in rows]
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes that are started
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=study.begin_worker) as pool,
        progress(desc="runs", unit="run", total=len(todo)) as bar,
    ):
        for done in as_completed([pool.submit(run, way, seed) for way, seed in todo]):
            files.append(RESULTS, done.result())
            bar.update()


def table(wanted: Sequence[Way], rows: Mapping[Key, Row]) -> str:
    """A line for each way, with the differences to a constant weight decay of the same seeds, in %."""
    reference, lines = ways()[0].name, []
    for way in wanted:
        pairs = [
            (row, rows[reference, seed])
            for (name, seed), row in sorted(rows.items())
            if name == way.name and (reference, seed) in rows
        ]
        if not pairs:
            continue
        differences = [100 * (row.report / other.report - 1) for row, other in pairs]
        loss = statistics.mean(row.report for row, _ in pairs)
        lines.append((way.name, str(len(pairs)), f"{loss:.5f}", study.interval(differences)))
    return study.markdown(("", "seeds", "loss, report images", "over constant, % (95 % interval)"), lines)


def main() -> None:
    options = study.parser(__doc__).parse_args()
    reference, *others = ways()
    wanted = [reference, *study.named(others, options.only)]
    if not options.report:
        run_missing(wanted, read_rows(), seeds=options.seeds, workers=options.workers)
    print(table(wanted, read_rows()))


if __name__ == "__main__":
    main()
