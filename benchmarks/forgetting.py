"""What keeps a LoRA from forgetting? The shipped base model learns two drawing styles one after the other, each under
its own trigger word, with each way of protection; then both styles and the base's own, without a trigger word, are
judged on images that no training saw.

    python -m benchmarks.forgetting                      # runs what is missing (hours on two cores), reports
    python -m benchmarks.forgetting --report             # the table of the finished runs
    python -m benchmarks.forgetting --only ewc --seeds 2

A seed fixes the adapter's start, the order of the images, the noise and the timesteps, so runs of one seed are pairs;
all ways of a seed go on from the same first task. The loss is the mean squared error of the predicted noise, the same
noise for all, at five noise levels. Each finished run is one row of benchmarks/results/forgetting.csv, so that an
interrupted study continues where it stopped. One process per core, one thread each.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import rows as files
from benchmarks import study

if TYPE_CHECKING:
    from library.training.run import Run

RESULTS = study.ROOT / "benchmarks" / "results" / "forgetting.csv"
NOTO = study.ROOT / "tests" / "assets" / "noto"  # the base's own style
TWEMOJI = study.ROOT / "benchmarks" / "data" / "twemoji"
STYLES = {"flat": study.STYLE, "twemoji": TWEMOJI}  # in the order of training, by their trigger words
STEPS, RATE, RANK = 160, 2e-3, 16
EARLIER_SHARE = 0.3  # of replay


@dataclass(frozen=True)
class Way:
    """One way to go on with the second style. `more`: words of the command line, in which `FIRST` is the first task's
    file, and `EARLIER` that of its data set."""

    name: str
    more: tuple[str, ...] = ()
    continues: bool = True  # the first task's network; else a new one on top of it
    replays: bool = False

    FIRST, EARLIER = "{first}", "{earlier}"


@dataclass(frozen=True)
class Row:
    """One finished run: the losses on held-out images. `way`: "base" before any training (seed 0), "first" after the
    first task, else after the second."""

    way: str
    seed: int
    steps: int
    rate: float
    flat: float
    twemoji: float
    own: float
    seconds: float


Key = tuple[str, int]


def ways() -> list[Way]:
    """The first is what the others are compared with. EWC with multiples of its computed lambda shows whether that is a
    good default."""
    ewc = ("--ewc_data", Way.EARLIER, "--ewc_lambda")
    return [
        Way("none"),
        Way("replay 0.3", replays=True),
        Way("ewc", ewc[:2]),
        Way("distillation 1", ("--distillation_weight", "1")),
        Way("progressive", ("--base_weights", Way.FIRST), continues=False),
        *(Way(f"ewc, lambda {value:g}", (*ewc, f"{value:g}")) for value in (20, 200, 2e3, 2e4, 2e5)),
        *(Way(f"distillation {weight:g}", ("--distillation_weight", f"{weight:g}")) for weight in (0.3, 3)),
        Way("ewc and distillation", (*ewc[:2], "--distillation_weight", "1")),
        Way("replay 0.3 and ewc", ewc[:2], replays=True),
    ]


# --- one run, in a process of its own ---------------------------------------------------------------------------------


def run_seed(seed: int, wanted: Sequence[Way], *, first_is_stored: bool) -> Iterator[Row]:
    """The first task, then the second in each of these ways."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.safetensors"
        began = time.perf_counter()
        run = _trained(_words(Path(folder), "flat", seed))
        if not first_is_stored:
            yield _row("first", seed, run, began)
        run.network.save(first, None, None)
        for way in wanted:
            began = time.perf_counter()
            begins = ["--network_weights", str(first), "--dim_from_weights"] if way.continues else []
            places = {Way.FIRST: str(first), Way.EARLIER: str(Path(folder) / "flat.toml")}
            more = [places.get(word, word) for word in way.more]
            words = _words(Path(folder), "twemoji", seed, *begins, *more, replays=way.replays)
            yield _row(way.name, seed, _trained(words), began)


def base_row() -> Row:
    """The base alone, in a run of no rate."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        return _row("base", 0, _built(_words(Path(folder), "flat", 0)), began)


def _words(folder: Path, style: str, seed: int, *more: str, replays: bool = False) -> list[str]:
    """The command line of a task; writes the file of its data."""
    import toml

    def subset(name: str) -> dict[str, Any]:
        return {"image_dir": str(STYLES[name] / "train"), "caption_extension": ".txt", "caption_prefix": f"{name} "}

    subsets = [subset(style)]
    if replays:
        subsets += [{**subset(name), "share": EARLIER_SHARE} for name in STYLES if name != style]
    data = folder / f"{style}.toml"
    data.write_text(toml.dumps({"datasets": [{"resolution": 64, "batch_size": study.BATCH_SIZE, "subsets": subsets}]}))
    return [
        *("--config_file", str(study.CONFIG), "--dataset_config", str(data), "--compare_prompts=", "--no-loss_plot"),
        *("--max_train_epochs", "0", "--max_train_steps", str(STEPS), "--seed", str(seed), "--overwrite"),
        *("--network_dim", str(RANK), "--network_alpha", str(RANK), "--learning_rate", str(RATE)),
        *("--network_train_unet_only", "--output_dir", str(folder / "out"), "--max_data_loader_n_workers", "0"),
        *more,
    ]


def _built(words: Sequence[str]) -> Run:
    from accelerate.state import AcceleratorState

    from library.config.parser import parse
    from library.run.build import build
    from library.run.plan import make_plan

    os.chdir(study.ROOT)
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps those of a process's first run
    return build(make_plan(parse(list(words))))


def _trained(words: Sequence[str]) -> Run:
    from library.training import loop
    from library.training.hooks.monitor import Monitor
    from library.training.hooks.saver import Saver

    run = _built(words)
    kept = replace(run, hooks=tuple(hook for hook in run.hooks if not isinstance(hook, (Monitor, Saver))))
    if loop.train(kept) is not None:
        raise KeyboardInterrupt  # a run that was stopped is no row
    return run


def _row(way: str, seed: int, run: Run, began: float) -> Row:
    """Judge the run's network, and forget it."""
    from benchmarks.fixed_noise_loss import fixed_noise_loss

    def judge(folder: Path, prefix: str) -> float:
        latents, captions = study.held_out(folder)
        found = fixed_noise_loss(run.family, latents, [prefix + text for text in captions], seed=study.NOISE_SEED)
        return sum(found.values()) / len(found)

    losses = {name: judge(folder / "report", f"{name} ") for name, folder in STYLES.items()}
    seconds = round(time.perf_counter() - began, 1)
    return Row(way, seed, STEPS, RATE, losses["flat"], losses["twemoji"], judge(NOTO, ""), seconds)


def _rows_of_seed(seed: int, wanted: Sequence[Way], first_is_stored: bool, path: Path) -> int:
    """Store each row as soon as it is there. Returns their number."""
    count = 0
    for row in run_seed(seed, wanted, first_is_stored=first_is_stored):
        files.append(path, row)
        count += 1
    return count


# --- all runs, and the report -----------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[Key, Row]:
    """The finished runs with these settings."""
    found = [row for row in files.read(path, Row) if (row.steps, row.rate) == (STEPS, RATE)]
    return {(row.way, row.seed): row for row in found}


def run_missing(wanted: Sequence[Way], rows: Mapping[Key, Row], *, seeds: int, workers: int) -> None:
    """Run until nothing is missing, a process for a seed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes that are started
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=study.begin_worker) as pool:
        running = []
        if ("base", 0) not in rows:
            files.append(RESULTS, pool.submit(base_row).result())
        for seed in range(1, seeds + 1):
            missing = [way for way in wanted if (way.name, seed) not in rows]
            if missing:
                running.append(pool.submit(_rows_of_seed, seed, missing, ("first", seed) in rows, RESULTS))
        for done in as_completed(running):
            print(f"{done.result()} runs of a seed are finished", flush=True)


def table(wanted: Sequence[Way], rows: Mapping[Key, Row]) -> str:
    """A line for each way, in % with 95 % intervals over the seeds: the rise of the first style's loss since it was
    learnt, the losses of the second style and of the base's own against the base's, and the first style's against the
    one without protection."""
    head = ("", "seeds", "flat, since learnt", "twemoji, over the base", "own style, over the base", "flat, over none")
    base, lines = rows[("base", 0)], []
    for way in wanted:
        seeds = [seed for name, seed in rows if name == way.name and ("first", seed) in rows]
        own = [rows[way.name, seed] for seed in sorted(seeds)]
        first = [rows["first", seed] for seed in sorted(seeds)]
        if len(own) < 2:
            continue
        paired = [(row, rows["none", row.seed]) for row in own if ("none", row.seed) in rows]
        lines.append(
            (
                *(way.name, str(len(own))),
                study.interval([100 * (row.flat / before.flat - 1) for row, before in zip(own, first, strict=True)]),
                study.interval([100 * (row.twemoji / base.twemoji - 1) for row in own]),
                study.interval([100 * (row.own / base.own - 1) for row in own]),
                "" if way.name == "none" else study.interval([100 * (r.flat / o.flat - 1) for r, o in paired]),
            )
        )
    return study.markdown(head, lines)


def main() -> None:
    options = study.parser(__doc__).parse_args()
    wanted = study.named(ways(), options.only)
    if not options.report:
        run_missing(wanted, read_rows(RESULTS), seeds=options.seeds, workers=options.workers)
    rows = read_rows(RESULTS)
    if ("base", 0) in rows:
        print(table(wanted, rows))


if __name__ == "__main__":
    main()
