"""The parts that all studies of held-out losses share: the plan, the runs, the statistics, the plot.

For each variant the learning rate is chosen first, with one seed, by the loss on the validation images: a grid of
powers of two that grows until its best rate has neighbours on both sides. Then fresh seeds are trained at that rate.
A seed fixes the adapter's start, the order of the images, the noise and the timesteps, so that runs of one seed are
pairs. The loss is the mean squared error of the predicted noise, the same noise for every run, at five noise levels.

Each finished run is one row of a CSV file, so an interrupted study continues where it stopped. One process per core,
one thread each.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from benchmarks import rows as files

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch import Tensor

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "quickstart.toml"
STYLE = ROOT / "quickstart" / "images"  # the quickstart's, with the folders train, validation and report
STEPS = 160
BATCH_SIZE = 4
GRID = (-1, 0, 1, 2)  # powers of two of a variant's middle rate, to begin with
LEAST, MOST = -6, 6
CHOOSING_SEED = 0
NOISE_SEED = 0
# Student's t, 97.5 %, by degrees of freedom
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 11: 2.201, 14: 2.145}


class Named(Protocol):
    @property
    def name(self) -> str: ...


class Variant(Named, Protocol):
    """One of the things that are compared. `filed`: the texts by which its rows are found. `middle`: the rate that the
    grid is laid around."""

    @property
    def filed(self) -> tuple[str, ...]: ...
    @property
    def middle(self) -> float: ...


class Row(Protocol):
    """One finished run. The losses are means over images and noise levels; `report` is nan for runs of the grid."""

    @property
    def filed(self) -> tuple[str, ...]: ...
    @property
    def rate(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def validation(self) -> float: ...
    @property
    def report(self) -> float: ...
    @property
    def seconds(self) -> float: ...


N = TypeVar("N", bound=Named)
V = TypeVar("V", bound=Variant)
R = TypeVar("R", bound=Row)
D = TypeVar("D", bound="DataclassInstance")
Key = tuple[tuple[str, ...], float, int]  # filed, rate, seed


# --- the plan ---------------------------------------------------------------------------------------------------------


def key_of(row: Row) -> Key:
    return row.filed, row.rate, row.seed


def rate(variant: Variant, power: int) -> float:
    return float(f"{variant.middle * 2.0**power:.4g}")


def tried(variant: Variant, rows: Mapping[Key, Row]) -> dict[int, float]:
    """Power of two → validation loss of the runs that choose the rate."""
    keys = {k: (variant.filed, rate(variant, k), CHOOSING_SEED) for k in range(LEAST, MOST + 1)}
    return {k: rows[key].validation for k, key in keys.items() if key in rows}


def best_power(variant: Variant, rows: Mapping[Key, Row]) -> int | None:
    """The power with the lowest loss, once its neighbours were tried too."""
    known = tried(variant, rows)
    if not set(GRID) <= set(known):
        return None
    best = min(known, key=lambda power: (known[power], power))
    neighbours = {power for power in (best - 1, best + 1) if LEAST <= power <= MOST}
    return best if neighbours <= set(known) else None


def missing(variant: Variant, rows: Mapping[Key, Row], seeds: int) -> list[tuple[float, int]]:
    """(rate, seed) of the runs that can be started now."""
    best = best_power(variant, rows)
    known = tried(variant, rows)
    if best is None:
        wanted = [power for power in GRID if power not in known]
        if not wanted:
            lowest = min(known, key=lambda power: (known[power], power))
            wanted = [power for power in (lowest - 1, lowest + 1) if power not in known and LEAST <= power <= MOST]
        return [(rate(variant, power), CHOOSING_SEED) for power in wanted]
    runs = [(rate(variant, best), seed) for seed in range(CHOOSING_SEED + 1, CHOOSING_SEED + 1 + seeds)]
    return [(r, seed) for r, seed in runs if (variant.filed, r, seed) not in rows]


# --- one run, in a process of its own ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run gives for its row. `parameters`: trained numbers."""

    validation: float
    report: float
    seconds: float
    parameters: int


def begin_worker() -> None:
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  bars; errors reach the parent as exceptions


@lru_cache
def held_out(folder: Path) -> tuple[Tensor, list[str]]:
    """Latents (the means) and captions of images that no training sees."""
    import torch

    from library.data.images import View, load_pixels
    from library.models.opening import open_family

    base = str(ROOT / "quickstart" / "base")
    family = open_family(base)
    family.components.load("vae", torch.float32, torch.device("cpu"))
    views = [View(path, resized=(64, 64), crop=(0, 0), size=(64, 64), flip=False) for path in paths_in(folder)]
    with torch.no_grad():
        mean, _ = family.encode_images(torch.stack([load_pixels(view) for view in views]))
    return mean, [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths_in(folder)]


def paths_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def words(
    style: Path, rate: float, seed: int, folder: str, *more: str, steps: int = STEPS, batch_size: int = BATCH_SIZE
) -> list[str]:
    """The command line of a run: the quickstart's configuration, of another length, without its network. Writes the
    files of the configuration and of the data set."""
    import toml

    configuration, dataset = Path(folder) / "configuration.toml", Path(folder) / "dataset.toml"
    sections = toml.loads(CONFIG.read_text(encoding="utf-8"))
    del sections["network"]
    configuration.write_text(toml.dumps(sections), encoding="utf-8")
    subset = {"image_dir": str(style / "train"), "caption_extension": ".txt"}
    data = {"datasets": [{"resolution": 64, "batch_size": batch_size, "subsets": [subset]}]}
    dataset.write_text(toml.dumps(data), encoding="utf-8")
    return [
        *("--config_file", str(configuration), "--dataset_config", str(dataset)),
        *("--max_train_epochs", "0", "--max_train_steps", str(steps), "--seed", str(seed)),
        *("--learning_rate", str(rate), "--text_encoder_lr", str(rate / 5), "--output_dir", folder),
        *("--max_data_loader_n_workers", "0", "--no-loss_plot"),
        *more,
    ]


def train_and_judge(
    style: Path, rate: float, seed: int, *more: str, steps: int = STEPS, batch_size: int = BATCH_SIZE
) -> Outcome:
    """One training run and its losses on the held-out images, infinite if it diverged. `more`: words of its own."""
    from accelerate.state import AcceleratorState

    from benchmarks.fixed_noise_loss import fixed_noise_loss
    from library.config.parser import parse
    from library.rng import without_dropout
    from library.run.build import build
    from library.run.plan import make_plan
    from library.training import loop
    from library.training.divergence import Diverged
    from library.training.hooks.monitor import Monitor
    from library.training.hooks.saver import Saver

    os.chdir(ROOT)
    began = time.perf_counter()
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps those of a process's first run
    diverged = False

    def judge(split: str) -> float:
        if diverged:
            return math.inf
        # with the average where the run keeps one, and with all ranks of a T-LoRA
        with run.weights_for("validate"), without_dropout(run.network):
            losses = fixed_noise_loss(run.family, *held_out(style / split), seed=NOISE_SEED)
        mean = sum(losses.values()) / len(losses)
        return mean if math.isfinite(mean) else math.inf

    with tempfile.TemporaryDirectory() as folder:
        run = build(make_plan(parse(words(style, rate, seed, folder, *more, steps=steps, batch_size=batch_size))))
        parameters = sum(run.network.parameter_counts().values())
        try:
            kept = replace(run, hooks=tuple(hook for hook in run.hooks if not isinstance(hook, (Monitor, Saver))))
            if loop.train(kept) is not None:
                raise KeyboardInterrupt  # a run that was stopped is no row
        except Diverged:
            diverged = True
        return Outcome(
            validation=judge("validation"),
            report=math.nan if seed == CHOOSING_SEED else judge("report"),
            seconds=round(time.perf_counter() - began, 1),
            parameters=parameters,
        )


# --- all runs ---------------------------------------------------------------------------------------------------------


def read_rows(path: Path, kind: type[D]) -> dict[Key, D]:
    """The finished runs of this length of training; `kind` is a dataclass with the attributes of `Row`."""
    return {key_of(row): row for row in files.read(path, kind) if row.steps == STEPS}  # type: ignore[attr-defined, arg-type]


def run_missing(
    todo: Sequence[V],
    rows: dict[Key, R],
    run: Callable[[V, float, int], R],
    store: Callable[[R], None],
    *,
    seeds: int,
    workers: int,
) -> None:
    """Run until nothing is missing. Earlier variants go first; each finished run is stored at once.

    `run` (variant, rate, seed) is called in other processes.
    """
    from library.progress import progress

    running: dict[Future[R], Key] = {}

    def next_run() -> tuple[V, float, int] | None:
        for variant in todo:
            for r, seed in missing(variant, rows, seeds):
                if (variant.filed, r, seed) not in running.values():
                    return variant, r, seed
        return None

    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes that are started
    context = multiprocessing.get_context("spawn")
    bar = progress(desc="runs", unit="run", initial=len(rows))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker) as pool:
        while True:
            while len(running) < workers and (found := next_run()) is not None:
                variant, r, seed = found
                running[pool.submit(run, *found)] = (variant.filed, r, seed)
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                row = done.result()
                rows[key_of(row)] = row
                store(row)
                bar.update()
    bar.close()


def complete(
    todo: Sequence[V],
    rows: dict[Key, R],
    run: Callable[[V, float, int], R],
    path: Path,
    options: argparse.Namespace,
) -> None:
    """Run what is missing, unless --report asks for what is there. Finished runs are added to the CSV file `path`,
    whose rows `rows` are. `options`: see `parser`."""
    if not options.report:
        store = partial(files.append, path)
        run_missing(todo, rows, run, store, seeds=options.seeds, workers=options.workers)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all studies have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, default=5, help="fresh seeds for each variant (default: 5)")
    made.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    made.add_argument("--only", nargs="+", metavar="TEXT", help="variants whose name contains one of these")
    made.add_argument("--report", action="store_true", help="only report what is there")
    return made


def named(variants: Sequence[N], texts: Sequence[str] | None) -> list[N]:
    """Those whose name contains one of the texts; all without texts."""
    return [v for v in variants if not texts or any(text.lower() in v.name.lower() for text in texts)]


# --- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result(Generic[V]):
    """A variant beside its reference. Differences are in percent of the reference's loss, negative is better."""

    variant: V
    reference: V
    rate: float
    loss: float
    difference: float
    margin: float
    """Half of the 95 % interval; nan where a run diverged."""
    seeds: int
    at_the_references_rate: float
    """Difference on the validation images, one seed, both at the rate that suits the reference; nan if not tried."""
    words: tuple[str, str] = ("pays", "does harm")
    """The verdicts for an interval below and above zero."""

    @property
    def is_reference(self) -> bool:
        return self.variant.name == self.reference.name

    @property
    def verdict(self) -> str:
        better, worse = self.words
        if self.seeds < 2 or self.is_reference:
            return ""
        if not math.isfinite(self.difference):
            return "diverged"
        if self.difference + self.margin < 0:
            return better
        return worse if self.difference - self.margin > 0 else "no difference seen"

    @property
    def interval(self) -> str:
        """The difference and its interval, as tables have them; nothing for the reference itself."""
        if self.is_reference or not math.isfinite(self.difference):
            return ""
        return f"{self.difference:+.2f} ({self.difference - self.margin:+.2f} … {self.difference + self.margin:+.2f})"


def finished(variant: Variant, rows: Mapping[Key, R]) -> dict[int, R]:
    """Seed → run at the chosen rate."""
    power = best_power(variant, rows)
    if power is None:
        return {}
    chosen = variant.filed, rate(variant, power)
    return {row.seed: row for row in rows.values() if (row.filed, row.rate) == chosen and row.seed != CHOOSING_SEED}


def compare(
    variant: V,
    reference: V,
    rows: Mapping[Key, Row],
    *,
    split: str = "report",
    words: tuple[str, str] = ("pays", "does harm"),
) -> Result[V] | None:
    """Paired by seed. None while either has fewer than two seeds in common or no rate yet."""
    ours, theirs = finished(variant, rows), finished(reference, rows)
    common = sorted(set(ours) & set(theirs))
    if len(common) < 2:
        return None
    losses = [(getattr(ours[seed], split), getattr(theirs[seed], split)) for seed in common]
    level = statistics.mean(other for _, other in losses)
    differences = [100 * (own - other) / level for own, other in losses]
    finite = all(map(math.isfinite, differences))
    degrees = max(key for key in T if key <= len(common) - 1)
    own_power, other_power = best_power(variant, rows), best_power(reference, rows)
    assert own_power is not None
    assert other_power is not None
    at_its_rate = rows.get((variant.filed, rate(reference, other_power), CHOOSING_SEED))
    same_rate = (at_its_rate.validation if at_its_rate else math.nan) / tried(reference, rows)[other_power] - 1
    return Result(
        variant=variant,
        reference=reference,
        rate=rate(variant, own_power),
        loss=statistics.mean(own for own, _ in losses),
        difference=statistics.mean(differences),
        margin=T[degrees] * statistics.stdev(differences) / math.sqrt(len(common)) if finite else math.nan,
        seeds=len(common),
        at_the_references_rate=100 * same_rate,
        words=words,
    )


def interval(values: Sequence[float]) -> str:
    """The mean and its 95 % interval; nothing for a single value."""
    if len(values) < 2:
        return ""
    degrees = max(key for key in T if key <= len(values) - 1)
    margin = T[degrees] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return f"{mean:+.2f} ({mean - margin:+.2f} … {mean + margin:+.2f})"


# --- what is shown ----------------------------------------------------------------------------------------------------


_COLOURS = {"pays": "tab:green", "better": "tab:green", "does harm": "tab:red", "worse": "tab:red"}


def hours(rows: Mapping[Key, Row]) -> str:
    seconds = sum(row.seconds for row in rows.values())
    return f"{len(rows)} runs of {STEPS} steps, {seconds / 3600:.1f} hours of one thread."


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    begin = ["|" + "".join(f" {cell} |" if cell else " |" for cell in head), "|" + "---|" * len(head)]
    return "\n".join([*begin, *("| " + " | ".join(cells) + " |" for cells in lines)])


def plot(panels: Mapping[str, Sequence[Result[V]]], path: Path) -> None:
    """Differences with their intervals, a panel for each title."""
    from matplotlib.figure import Figure

    heights = [len(members) + 1 for members in panels.values()]
    figure = Figure(figsize=(8, 0.28 * sum(heights) + 1.2), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    for axis, (title, members) in zip(axes, panels.items(), strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        for place, r in enumerate(members):
            colour = _COLOURS.get(r.verdict, "0.35")
            axis.errorbar(r.difference, place, xerr=r.margin, fmt="o", color=colour, capsize=3, markersize=4)
        axis.set_yticks(range(len(members)), [r.variant.name for r in members], fontsize=8)
        axis.set_ylim(len(members) - 0.4, -0.6)
        axis.set_title(title, fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1].set_xlabel("difference of the held-out loss, % (left is better; 95 % interval)", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def shown_path(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
