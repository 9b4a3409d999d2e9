"""The command `cross_validate`: trains the user's own settings several times, each time with another part of the images
held out, and averages the losses on these parts."""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.config import parser
from library.config.command import Command, run
from library.config.data import dataset_config
from library.config.fields import option
from library.config.options import Options
from library.errors import UserError
from library.evaluation import sweep
from library.evaluation.sweep import Outcome, Planned
from library.files.atomic import replacing
from library.units import human_time

DESCRIPTION = """\
Cross-validation: divides the images into several parts, trains on all but one of them, once for each part, and averages
the lowest losses on the parts held out. Options of train_network.py stand behind --, as in

    cross_validate --config_file my.toml --folds 5 -- --validation_group near --learning_rate 2e-4

Interrupted, it continues with the same command: finished runs are read, and one that was interrupted resumes from its
last state, after its last whole epoch."""


@dataclass(frozen=True, kw_only=True)
class CrossValidateOptions:
    """The parts"""

    config_file: str | None = option(None, help="the settings of the runs: a TOML file of train_network.py")
    folds: int = option(5, minimum=2, help="the number of parts, and of runs; each image is held out in one of them")
    overwrite: bool = option(False, help="train everything again, also what is finished or has other settings")


COMMAND = Command(name="cross_validate", description=DESCRIPTION, groups={"sweep": CrossValidateOptions})


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: that of a training which failed or was stopped, else 0. Raises UserError."""
    groups, words = sweep.read_words(COMMAND, argv)
    wanted: CrossValidateOptions = groups["sweep"]
    own = parser.parse(words)
    _check(own)
    runs = list(planned(own, words, wanted.folds))
    dataset_config.load_datasets(runs[0].options)  # mistakes in the files are found before the first run
    folder = runs[0].file.parent
    if not wanted.overwrite:
        for one in runs:
            sweep.refuse_other_settings(one)
    print(f"{len(runs)} runs into {folder}: each holds out another one of {wanted.folds} parts of the images")
    outcomes, code = sweep.train_all(runs, anew=wanted.overwrite)
    if code:
        return code
    for line in table(outcomes):
        print(line)
    path = folder / "cross-validation.csv"
    _write_csv(path, outcomes)
    print(f"written: {path}")
    return 0


def _check(own: Options) -> None:
    """`UserError` for settings that cannot be cross-validated."""
    sweep.refuse_other_jobs(own, "cross_validate")
    for name in ("validation_split", "validation_fold"):
        if getattr(own.validation, name):
            raise UserError(f"--{name}: leave it out; --folds decides how many images each run holds out")


def planned(own: Options, words: Sequence[str], folds: int) -> Iterator[Planned]:
    """The runs, one a part. What the user gave stays, but for the places of the files. All runs have the same seed, so
    they differ in their images alone."""
    seed = own.training.seed or 0
    noise = own.validation.validation_seed
    folder = Path(own.output.output_dir) / f"{own.output.output_name or 'last'}-folds"
    for part in range(1, folds + 1):
        more = [
            *("--validation_fold", f"{part}/{folds}", "--seed", str(seed), "--monitoring=true"),
            *("--validation_seed", str(seed if noise is None else noise)),
            *("--output_dir", str(folder), "--output_name", f"part{part}of{folds}", *sweep.state_words(own)),
        ]
        all_words = (*words, *more)
        yield Planned(f"part {part} of {folds}", seed, all_words, sweep.options_of(all_words))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two values and its standard error, s / √n."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The lines of the table, with the averages last."""
    yield f"{'part':<12}{'before training':<18}{'lowest loss':<14}{'lower by':<12}{'at step':<10}trained"
    for number, one in enumerate(outcomes, 1):
        yield (
            f"{number:<12}{one.base:<18.5f}{one.loss:<14.5f}{f'{_gain(one):.2f} %':<12}{one.step:<10}"
            f"{human_time(one.seconds)}"
        )
    loss, error = mean_and_error([one.loss for one in outcomes])
    gain, spread = mean_and_error([_gain(one) for one in outcomes])
    yield (
        f"\nmean of {len(outcomes)} parts: loss {loss:.5f} ± {error:.5f}, lower than the base's by {gain:.2f} ± "
        f"{spread:.2f} % (± one standard error)"
    )
    steps = sorted(one.step for one in outcomes)
    yield f"the loss was lowest at step {steps[0]} to {steps[-1]}, the median is {statistics.median(steps):g}"


def _gain(one: Outcome) -> float:
    """The fall of the loss in % of the base's."""
    return 100 * (one.base - one.loss) / one.base


def _write_csv(path: Path, outcomes: Sequence[Outcome]) -> None:
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("part", "base_loss", "lowest_loss", "at_step", "seconds"))
        for number, one in enumerate(outcomes, 1):
            writer.writerow((number, f"{one.base:.7g}", f"{one.loss:.7g}", one.step, f"{one.seconds:.1f}"))


if __name__ == "__main__":
    sys.exit(run(main))
