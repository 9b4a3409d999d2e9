"""Does the rate finder's suggestion train well? The quickstart (160 steps) at the suggested rates, at ten times and
at a tenth of them, and at the rates of the other rule, measured on held-out images.

    python -m benchmarks.rate_finder             # makes the missing runs (3 seeds, half an hour), then reports
    python -m benchmarks.rate_finder --report    # the table of the finished runs

Each finished run is one row of benchmarks/results/rate_finder.csv. A seed fixes the LoRA's start, the order of the
images, the noise and the timesteps. The loss is the mean squared error of the predicted noise on the validation images,
the same noise for every run, at five noise levels.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.rows import append, read
from benchmarks.study import CONFIG, NOISE_SEED, ROOT, STYLE, held_out

RESULTS = ROOT / "benchmarks" / "results" / "rate_finder.csv"
EPOCHS = 8  # of the quickstart's 20: 160 steps
MULTIPLES = {"steepest": (1.0, 0.1, 10.0), "tenth": (1.0,)}  # of the rate by each rule


@dataclass(frozen=True)
class Row:
    """One finished run. `factor`: times the quickstart's rates; `loss`: on the validation images."""

    seed: int
    rule: str
    multiple: float
    rate: float
    factor: float
    steps: int
    loss: float


def words(seed: int, folder: str, *more: str) -> list[str]:
    output = ("--max_train_epochs", str(EPOCHS), "--output_dir", folder, "--no-loss_plot", "--compare_prompts=")
    return ["--config_file", str(CONFIG), "--seed", str(seed), "--max_data_loader_n_workers", "0", *output, *more]


def suggested(seed: int, *more: str) -> dict[str, float]:
    """Rule → factor on the configured rates."""
    from library.config.parser import parse
    from library.guidance import find_lr
    from library.run.build import build
    from library.run.plan import make_plan

    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(parse(words(seed, folder, *more, "--find_lr")))
        found = find_lr.find(plan, build(plan))
    return {"steepest": found.suggestion.steepest / found.reference, "tenth": found.suggestion.tenth / found.reference}


def train_and_judge(seed: int, factor: float, *more: str) -> tuple[float, int]:
    """The loss on the validation images after training with the configured rates times `factor`, and the steps."""
    from benchmarks.fixed_noise_loss import fixed_noise_loss
    from library.config.parser import parse
    from library.run.build import build
    from library.run.plan import make_plan
    from library.training import loop
    from library.training.divergence import Diverged
    from library.training.hooks.monitor import Monitor
    from library.training.hooks.saver import Saver

    configured = parse(words(seed, "unused", *more)).optimizer
    assert configured.text_encoder_lr is not None
    rates = [f"--learning_rate={configured.learning_rate * factor}"]
    rates.append(f"--text_encoder_lr={configured.text_encoder_lr[0] * factor}")
    with tempfile.TemporaryDirectory() as folder:
        run = build(make_plan(parse(words(seed, folder, *more, *rates))))
        run = replace(run, hooks=tuple(hook for hook in run.hooks if not isinstance(hook, (Monitor, Saver))))
        try:
            loop.train(run)
        except (Diverged, ValueError):
            return math.inf, run.position.total
        losses = fixed_noise_loss(run.family, *held_out(STYLE / "validation"), seed=NOISE_SEED)
    mean = sum(losses.values()) / len(losses)
    return (mean if math.isfinite(mean) else math.inf), run.position.total


def read_rows(path: Path) -> list[Row]:
    return read(path, Row)


def run_missing(seeds: int) -> None:
    """Run until nothing is missing; each finished run is written at once."""
    import torch
    from accelerate.state import AcceleratorState

    from library.config.parser import parse

    torch.set_num_threads(1)
    for seed in range(1, seeds + 1):
        done = {(row.rule, row.multiple) for row in read_rows(RESULTS) if row.seed == seed}
        missing = [(rule, m) for rule, multiples in MULTIPLES.items() for m in multiples if (rule, m) not in done]
        factors = suggested(seed) if missing else {}
        for rule, multiple in missing:
            AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps those of a process's first run
            factor = factors[rule] * multiple
            loss, steps = train_and_judge(seed, factor)
            rate = parse(words(seed, "unused")).optimizer.learning_rate * factor
            append(RESULTS, Row(seed, rule, multiple, rate, factor, steps, loss))


def report(rows: list[Row]) -> None:
    """A table: a line for each seed and rule."""
    print("| seed | rule | rate | loss | at ten times the rate | at a tenth of it |")
    print("|---|---|---|---|---|---|")
    for seed in sorted({row.seed for row in rows}):
        for rule in MULTIPLES:
            found = {row.multiple: row for row in rows if (row.seed, row.rule) == (seed, rule)}
            losses = [f"{found[m].loss:.5f}" if m in found else "" for m in (1.0, 10.0, 0.1)]
            if 1.0 in found:
                print(f"| {seed} | {rule} | {found[1.0].rate:.1e} | {' | '.join(losses)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="only report the finished runs")
    options = parser.parse_args()
    if not options.report:
        run_missing(options.seeds)
    report(read_rows(RESULTS))


if __name__ == "__main__":
    main()
