"""The command `find_rank`: trains the user's own settings at several ranks and names the smallest that is enough."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.config import parser
from library.config.command import Command, run
from library.config.data import dataset_config
from library.config.fields import BadValue, option, read_int
from library.config.options import Options
from library.errors import UserError
from library.evaluation import rank_curve, sweep
from library.evaluation.rank_curve import ALPHAS, Point, Trained, alpha_of
from library.files.atomic import replacing
from library.units import human_bytes, human_time

DESCRIPTION = """\
Trains a LoRA at each of several ranks with the settings of a config file, one after the other, and compares the lowest
losses on held-out images. Options of train_network.py stand behind --, as in

    find_rank --config_file my.toml --ranks 4,8,16 -- --validation_split 0.1 --learning_rate 2e-4

An interrupted sweep continues with the same command: finished ranks are read, and one that was interrupted resumes from
its last state, after its last whole epoch."""


def read_ranks(word: str) -> tuple[int, ...]:
    """ "4,8,16", each once, in ascending order."""
    ranks = sorted({read_int(part) for part in word.split(",") if part})
    if not ranks or ranks[0] < 1:
        raise BadValue(f"'{word}' is not a list of ranks such as 4,8,16")
    return tuple(ranks)


@dataclass(frozen=True, kw_only=True)
class FindRankOptions:
    """The sweep"""

    config_file: str | None = option(None, help="the settings of the runs: a TOML file of train_network.py")
    ranks: tuple[int, ...] = option(
        (4, 8, 16, 32, 64), read=read_ranks, joined_by=",", help="the ranks to try, such as 4,8,16"
    )
    alpha: Literal["ratio", "sqrt", "fixed"] = option(
        "ratio", help="; ".join(f"{name}: {text}" for name, text in ALPHAS.items())
    )
    seeds: int = option(1, minimum=1, help="train each rank with this many seeds: that of the settings and those after")
    within: float = option(
        5.0, minimum=0, maximum=100, help="a rank is enough if it is behind the best by this % of the best one's gain"
    )
    overwrite: bool = option(False, help="train everything again, also what is finished or has other settings")


COMMAND = Command(name="lora-tools find_rank", description=DESCRIPTION, groups={"sweep": FindRankOptions})


@dataclass(frozen=True)
class Planned(sweep.Planned):
    """A run at one rank."""

    rank: int
    alpha: float


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: that of a training which failed or was stopped, else 0. Raises UserError."""
    groups, words = sweep.read_words(COMMAND, argv)
    wanted: FindRankOptions = groups["sweep"]
    own = parser.parse(words)
    _check(own)
    runs = list(planned(own, words, wanted))
    folder = runs[0].file.parent
    paths = [folder / f"find-rank.{end}" for end in ("csv", "png")]
    if not wanted.overwrite:
        for one in runs:
            sweep.refuse_other_settings(one)
    print(f"{len(runs)} runs into {folder}: ranks {', '.join(map(str, wanted.ranks))}; {ALPHAS[wanted.alpha]}")
    outcomes, code = sweep.train_all(runs, anew=wanted.overwrite)
    if code:
        return code
    done = [_trained(one, outcome) for one, outcome in zip(runs, outcomes, strict=True)]
    found = rank_curve.points(done)
    chosen = rank_curve.knee(found, within=wanted.within)
    for line in table(found, chosen, within=wanted.within):
        print(line)
    _write_csv(paths[0], done)
    rank_curve.plot(paths[1], found, chosen)
    print(f"written: {paths[0]}, {paths[1]}")
    return 0


def _check(own: Options) -> None:
    """`UserError` for settings of which a sweep of ranks cannot be made."""
    if not (own.validation.validation_dir or dataset_config.is_validated(dataset_config.load_datasets(own))):
        raise UserError(
            "ranks are compared by the loss on held-out images, and there are none: add --validation_split 0.1 behind "
            "--, --validation_dir, or a validation_dir to a subset of --dataset_config (docs/validation.md)"
        )
    sweep.refuse_other_jobs(own, "find_rank")
    for name in ("dim_from_weights", "network_weights"):
        if vars(own.network)[name]:
            raise UserError(f"--{name}: leave it out; find_rank trains new networks of several ranks")
    _refuse_kinds_without_rank(own)


def _refuse_kinds_without_rank(own: Options) -> None:
    from networks import kinds
    from networks.adapter import WithRank

    module = own.network.network_module
    kind = kinds.kind_of(module, own.network.network_args)
    if kind is not None and not issubclass(kinds.load(kind), WithRank):
        raise UserError(f"--network_module {module}: {kinds.load(kind).NOUN} has no rank to find")


def planned(own: Options, words: Sequence[str], wanted: FindRankOptions) -> Iterator[Planned]:
    """The runs: every rank with the first seed, then with the second. What the user gave stays, but for rank, alpha,
    seed and the places of the files; all runs hold out the same images, with the same noise."""
    own_rank = own.network.network_dim or 4  # the trainer's default
    own_alpha = own.network.network_alpha or float(own_rank)  # 0 means the rank
    if "network_alpha" not in own.given and wanted.alpha != "fixed":
        own_alpha = float(own_rank)
    first = own.training.seed or 0
    noise = own.validation.validation_seed
    folder = Path(own.output.output_dir) / f"{own.output.output_name or 'last'}-ranks"
    for seed in range(first, first + wanted.seeds):
        for rank in wanted.ranks:
            alpha = alpha_of(wanted.alpha, rank, own_rank=own_rank, own_alpha=own_alpha)
            more = [
                *("--network_dim", str(rank), "--network_alpha", f"{alpha:g}", "--seed", str(seed)),
                *("--validation_seed", str(first if noise is None else noise), "--monitoring=true"),
                *("--output_dir", str(folder), "--output_name", f"rank{rank}-seed{seed}", *sweep.state_words(own)),
            ]
            all_words = (*words, *more)
            name = f"rank {rank}, seed {seed}"
            yield Planned(name, seed, all_words, sweep.options_of(all_words), rank, alpha)


def _trained(one: Planned, outcome: sweep.Outcome) -> Trained:
    size = one.file.stat().st_size
    return Trained(one.rank, one.alpha, one.seed, outcome.base, outcome.loss, outcome.step, size, outcome.seconds)


def table(found: Sequence[Point], chosen: Point, *, within: float) -> Iterator[str]:
    """The lines of the table, and the sentence about the knee."""
    several = len(found[0].runs) > 1
    heads = ["rank", "alpha", "held-out loss", "better than the base", "behind the best", "at step", "file", "trained"]
    rows = [heads]
    for point in found:
        behind = f"{100 * point.behind / point.base:.2f} %"
        behind += f" ± {100 * point.error / point.base:.2f}" if several else ""
        steps = ", ".join(str(one.step) for one in point.runs)
        trained = human_time(sum(one.seconds for one in point.runs))
        cells = (f"{point.runs[0].alpha:g}", f"{point.loss:.5f}", f"{point.gain:.2f} %", behind, steps)
        rows.append([str(point.rank), *cells, human_bytes(point.runs[0].bytes), trained])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    rule = f"no more than {within:g} % of the best rank's gain over the base"
    rule += ", or one standard error, behind it" if several else " behind it"
    yield f"\nthe knee: rank {chosen.rank}, the smallest that is {rule}"
    if more := rank_curve.advice(found, chosen):
        yield more


def _write_csv(path: Path, runs: Sequence[Trained]) -> None:
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("rank", "alpha", "seed", "base_loss", "lowest_loss", "at_step", "bytes", "seconds"))
        for one in sorted(runs, key=lambda one: (one.rank, one.seed)):
            losses = f"{one.base:.7g}", f"{one.loss:.7g}"
            writer.writerow((one.rank, f"{one.alpha:g}", one.seed, *losses, one.step, one.bytes, f"{one.seconds:.1f}"))


if __name__ == "__main__":
    sys.exit(run(main))
