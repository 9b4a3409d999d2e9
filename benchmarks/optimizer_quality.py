"""Does CustomAdamW earn its place? LoRA fine-tunes of the shipped base model on the shipped style, judged on images
that no training saw.

    python -m benchmarks.optimizer_quality             # runs what is missing (hours on two cores), then reports
    python -m benchmarks.optimizer_quality --report    # the table and the plot of what is there

For each variant the learning rate is chosen first, with one seed, by the loss on the validation images: a grid of
powers of two that grows until its best rate has neighbours on both sides. Then fresh seeds are trained at that rate.
A seed fixes the LoRA's start, the order of the images, the noise and the timesteps, so that runs of one seed are pairs.
The loss is the mean squared error of the predicted noise, the same noise for every run, at five noise levels.

Each finished run is one row of benchmarks/results/optimizer_quality.csv, so an interrupted study goes on where it was.
One process per core, one thread each.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.rows import append, read
from library.config.registry import Arguments

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "optimizer_quality.csv"
STEPS = 160
BATCH_SIZE = 4
RANK = 16
MIDDLE = 2e-3  # the rate that the grid is laid around
GRID = (-1, 0, 1, 2)  # powers of two of it, to begin with
LEAST, MOST = -6, 6
CHOOSING_SEED = 0
NOISE_SEED = 0

TECHNIQUES: dict[str, tuple[str, ...]] = {  # switch → its settings worth naming
    "use_spd": ("spd_lambda",),
    "use_cautious": (),
    "use_orthogonal_grad": (),
    "use_adopt_stability": (),
    "use_grams": (),
    "use_agr": (),
    "use_tam": ("tam_beta",),
    "use_alora": ("alora_ratio",),
    "dynamic_weight_decay": ("wd_transition_steps",),
}
TITLES = {
    "use_spd": "SPD",
    "use_cautious": "Cautious",
    "use_orthogonal_grad": "⊥Grad",
    "use_adopt_stability": "ADOPT",
    "use_grams": "Grams",
    "use_agr": "AGR",
    "use_tam": "TAM",
    "use_alora": "ALoRA",
    "dynamic_weight_decay": "dynamic weight decay",
}
ADAMW, NOTHING, SHIPPED = "AdamW", "CustomAdamW, nothing on", "CustomAdamW as shipped"
# 1000 steps, its default, are more than a run of this study has
SHORT = {"wd_transition_steps": STEPS // 5}


@dataclass(frozen=True)
class Variant:
    """An optimizer with its settings; `settings` are those of CustomAdamW that differ from what is shipped."""

    name: str
    kind: str
    optimizer: str = "CustomAdamW"
    settings: Mapping[str, bool | float] = field(default_factory=dict)

    @property
    def techniques(self) -> str:
        """Everything that is on, spelled out: what a row of results is filed under, whatever is shipped by then."""
        if self.optimizer != "CustomAdamW":
            return ""
        resolved = {**shipped(), **self.settings}
        on = [switch for switch in TECHNIQUES if resolved[switch]]
        return " ".join(
            "".join([switch.removeprefix("use_"), *(f":{name}={resolved[name]:g}" for name in TECHNIQUES[switch])])
            for switch in on
        )


@lru_cache
def shipped() -> Arguments:
    """CustomAdamW's own defaults."""
    from library.optimizers import CustomAdamW

    parameters = inspect.signature(CustomAdamW.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def variants() -> list[Variant]:
    """In the order in which they are run: what decides the defaults first."""
    off: dict[str, bool | float] = dict.fromkeys(TECHNIQUES, False)
    on: dict[str, bool | float] = {switch: True for switch in TECHNIQUES if shipped()[switch]}
    everything: dict[str, bool | float] = dict.fromkeys(TECHNIQUES, True)
    # what was on before there was a study
    first: dict[str, bool | float] = {"use_grams": False, "use_orthogonal_grad": False, "alora_ratio": 4.0}
    exclusive = {"use_grams": {"use_cautious": False}}
    values = [
        *(("use_alora", "alora_ratio", ratio) for ratio in (1.0, 4.0, 8.0, 16.0)),
        ("use_tam", "tam_beta", 0.99),
        *(("use_spd", "spd_lambda", size) for size in (0.01, 0.3)),
    ]
    return [
        Variant(ADAMW, "peer", "AdamW"),
        Variant("AdamW8bit", "peer", "AdamW8bit"),
        Variant(NOTHING, "whole", settings=off),
        Variant(SHIPPED, "whole"),
        *(Variant(f"{TITLES[s]} alone", "alone", settings={**off, s: True} | SHORT) for s in TECHNIQUES),
        *(Variant(f"without {TITLES[s]}", "left out", settings={s: False}) for s in on),
        *(
            Variant(f"with {TITLES[s]}", "added", settings={s: True} | exclusive.get(s, {}))
            for s in TECHNIQUES
            if s not in on
        ),
        *(
            Variant(f"{TITLES[s]} alone, {name} {value:g}", "alone", settings={**off, s: True, name: value})
            for s, name, value in values
        ),
        Variant("with ALoRA, alora_ratio 4", "added", settings={"use_alora": True, "alora_ratio": 4.0}),
        Variant("all but Grams and ⊥Grad, alora_ratio 4", "whole", settings=everything | first),
        Variant("all but Grams", "whole", settings=everything | {"use_grams": False}),
    ]


@dataclass(frozen=True)
class Row:
    """One finished run. The losses are means over images and noise levels; `report` is nan for runs of the grid."""

    optimizer: str
    techniques: str
    rate: float
    seed: int
    steps: int
    validation: float
    report: float
    seconds: float


Key = tuple[str, str, float, int]


def key_of(row: Row) -> Key:
    return row.optimizer, row.techniques, row.rate, row.seed


def rate(power: int) -> float:
    return float(f"{MIDDLE * 2.0**power:.4g}")


def tried(variant: Variant, rows: Mapping[Key, Row]) -> dict[int, float]:
    """Power of two → validation loss of the runs that choose the rate."""
    keys = {k: (variant.optimizer, variant.techniques, rate(k), CHOOSING_SEED) for k in range(LEAST, MOST + 1)}
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
        return [(rate(power), CHOOSING_SEED) for power in wanted]
    runs = [(rate(best), seed) for seed in range(CHOOSING_SEED + 1, CHOOSING_SEED + 1 + seeds)]
    return [(r, seed) for r, seed in runs if (variant.optimizer, variant.techniques, r, seed) not in rows]


# --- one run, in a process of its own ---------------------------------------------------------------------------------


def _begin_worker() -> None:
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  bars; errors reach the parent as exceptions


@lru_cache
def held_out(split: str) -> tuple[Tensor, list[str]]:
    """Latents (the means) and captions of images that no training sees."""
    import torch

    from library.data.images import View, load_pixels
    from library.models.opening import open_family

    base = str(ROOT / "quickstart" / "base")
    family = open_family(base)
    family.components.load("vae", torch.float32, torch.device("cpu"))
    paths = sorted((ROOT / "quickstart" / "images" / split).glob("*.png"))
    views = [View(path, resized=(64, 64), crop=(0, 0), size=(64, 64), flip=False) for path in paths]
    with torch.no_grad():
        mean, _ = family.encode_images(torch.stack([load_pixels(view) for view in views]))
    return mean, [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]


def words(variant: Variant, *, rate: float, seed: int, folder: str) -> list[str]:
    """The command line of a run: the quickstart's configuration, shorter, at rank 16. Writes its data set's file."""
    dataset = Path(folder) / "dataset.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = {BATCH_SIZE}\n[[datasets.subsets]]\n"
        'image_dir = "quickstart/images/train"\ncaption_extension = ".txt"\n',
        encoding="utf-8",
    )
    given = [f"{name}={value}" for name, value in variant.settings.items()]
    return [
        *("--config_file", "configs/quickstart.toml", "--dataset_config", str(dataset)),
        *("--max_train_epochs", "0", "--max_train_steps", str(STEPS), "--seed", str(seed)),
        *("--network_dim", str(RANK), "--network_alpha", str(RANK)),
        *("--learning_rate", str(rate), "--text_encoder_lr", str(rate / 5), "--output_dir", folder),
        *("--optimizer_type", variant.optimizer, "--max_data_loader_n_workers", "0", "--no-loss_plot"),
        *(("--optimizer_args", *given) if given else ()),
    ]


def train_and_judge(variant: Variant, rate: float, seed: int) -> Row:
    """One training run and its losses on the held-out images; infinite if it diverged."""
    from accelerate.state import AcceleratorState

    from benchmarks.fixed_noise_loss import fixed_noise_loss
    from library.config.parser import parse
    from library.run.build import build
    from library.run.plan import make_plan
    from library.training import loop
    from library.training.hooks.monitor import Monitor
    from library.training.hooks.saver import Saver

    os.chdir(ROOT)
    began = time.perf_counter()
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps those of a process's first run

    def judge(split: str) -> float:
        losses = fixed_noise_loss(run.family, *held_out(split), seed=NOISE_SEED)
        mean = sum(losses.values()) / len(losses)
        return mean if math.isfinite(mean) else math.inf

    with tempfile.TemporaryDirectory() as folder:
        run = build(make_plan(parse(words(variant, rate=rate, seed=seed, folder=folder))))
        loop.train(replace(run, hooks=tuple(hook for hook in run.hooks if not isinstance(hook, (Monitor, Saver)))))
        return Row(
            optimizer=variant.optimizer,
            techniques=variant.techniques,
            rate=rate,
            seed=seed,
            steps=STEPS,
            validation=judge("validation"),
            report=math.nan if seed == CHOOSING_SEED else judge("report"),
            seconds=round(time.perf_counter() - began, 1),
        )


# --- the study --------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[Key, Row]:
    """The finished runs of this length of training."""
    return {key_of(row): row for row in read(path, Row) if row.steps == STEPS}


def run_missing(todo: Iterable[Variant], *, seeds: int, workers: int) -> None:
    """Run until nothing is missing. Earlier variants go first; each finished run is written at once."""
    from library.progress import progress

    rows = read_rows(RESULTS)
    todo = list(todo)
    running: dict[Future[Row], Key] = {}

    def next_run() -> tuple[Variant, float, int] | None:
        for variant in todo:
            for r, seed in missing(variant, rows, seeds):
                if (variant.optimizer, variant.techniques, r, seed) not in running.values():
                    return variant, r, seed
        return None

    context = multiprocessing.get_context("spawn")
    bar = progress(desc="runs", unit="run", initial=len(rows))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        while True:
            while len(running) < workers and (found := next_run()) is not None:
                variant, r, seed = found
                running[pool.submit(train_and_judge, *found)] = (variant.optimizer, variant.techniques, r, seed)
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                row = done.result()
                rows[key_of(row)] = row
                append(RESULTS, row)
                bar.update()
    bar.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="fresh seeds for each variant (default: 5)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="variants whose name contains one of these")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    options = parser.parse_args()
    wanted = [v for v in variants() if not options.only or any(text.lower() in v.name.lower() for text in options.only)]
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes that are started
    if not options.report:
        run_missing(wanted, seeds=options.seeds, workers=options.workers)
    from benchmarks.quality_report import report

    report(wanted, read_rows(RESULTS))


if __name__ == "__main__":
    main()
