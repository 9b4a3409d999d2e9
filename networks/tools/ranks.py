"""Show how much of a LoRA's rank is used: singular values, energy and effective rank of each layer.

python -m networks.tools ranks fox.safetensors
python -m networks.tools ranks fox.safetensors --csv ranks.csv --plot ranks.png

The singular values are those of the layer's difference, alpha / rank included. Measures:
energy          share of the squared singular values up to a rank: 90 and 99 % of it need this rank
effective rank  exp of the entropy of the singular values over their sum (Roy, Vetterli 2007)
stable rank     squared Frobenius norm / squared largest singular value
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.command import Command, Word, read
from library.config.fields import option
from library.errors import UserError
from library.progress import bar
from networks.tools.output import check_output

if TYPE_CHECKING:
    from torch import Tensor

_COLUMNS = ("layer", "rank", "norm", "largest", "effective_rank", "stable_rank", "rank_90", "rank_99")
_VALUES_SHOWN = 100  # of each layer, in the picture


@dataclass(frozen=True)
class Spectrum:
    """The measures of one layer. rank: of the file. rank_90, rank_99: that hold these shares of the energy."""

    layer: str
    rank: int
    norm: float
    largest: float
    effective_rank: float
    stable_rank: float
    rank_90: int
    rank_99: int
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RanksOptions:
    """What is written"""

    csv: Path | None = option(None, help="write a table of the layers into this .csv, singular values included")
    plot: Path | None = option(None, help="draw singular values and energy into this .png")
    overwrite: bool = option(False, help="replace these files where they exist")


COMMAND = Command(
    name="lora-tools ranks",
    description=__doc__,
    groups={"ranks": RanksOptions},
    words=(Word("FILE", "the LoRA file"),),
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    from library.files.atomic import replacing
    from networks.tools import result

    options: RanksOptions = given.groups["ranks"]
    file = Path(given.words[0])
    for name, path, end in (("--csv", options.csv, ".csv"), ("--plot", options.plot, ".png")):
        if path is not None:
            check_output(path, [file], overwrite=options.overwrite, option=name, end=end)
    (source,) = result.read([file], purpose="is analysed")
    found = [
        spectrum_of(name, factors.rank, factors.values())
        for name, factors in bar(result.factors(source).items(), desc="singular values", unit="layer")
    ]
    print("\n".join(report(found)))
    if options.csv is not None:
        with replacing(options.csv) as beside:
            beside.write_text(table(found), encoding="utf-8")
    if options.plot is not None:
        with replacing(options.plot) as beside:
            draw(beside, found, title=file.name)
    return 0


def spectrum_of(layer: str, rank: int, values: Tensor) -> Spectrum:
    """The measures of singular values, from the largest down. A layer without effect has an effective rank of 0."""
    values = values.double()
    energy, total = values.square(), float(values.sum())
    if not total:
        return Spectrum(layer, rank, 0.0, 0.0, 0.0, 0.0, 0, 0, tuple(values.tolist()))
    shares = values[values > 0] / total
    return Spectrum(
        layer,
        rank,
        norm=float(energy.sum().sqrt()),
        largest=float(values[0]),
        effective_rank=math.exp(-float((shares * shares.log()).sum())),
        stable_rank=float(energy.sum() / energy[0]),
        rank_90=rank_for(values, 0.9),
        rank_99=rank_for(values, 0.99),
        values=tuple(values.tolist()),
    )


def rank_for(values: Tensor, share: float) -> int:
    """The smallest rank that holds this share of the energy."""
    energy = values.double().square()
    return int((energy.cumsum(0) < share * energy.sum() * (1 - 1e-12)).sum()) + 1


def report(found: Sequence[Spectrum]) -> list[str]:
    """Lines: a table of the layers, and a summary."""
    width = max(len(one.layer) for one in found)
    lines = [f"{'layer':<{width}}  {'rank':>5} {'norm':>9} {'effective':>9} {'stable':>7} {'90 %':>5} {'99 %':>5}"]
    lines += [
        f"{one.layer:<{width}}  {one.rank:>5} {one.norm:>9.4g} {one.effective_rank:>9.2f} {one.stable_rank:>7.2f} "
        f"{one.rank_90:>5} {one.rank_99:>5}"
        for one in found
    ]
    active = [one for one in found if one.norm]
    if not active:
        return [*lines, "", "every layer is 0: the file has no effect"]
    weights = [one.norm**2 for one in active]
    mean = sum(one.effective_rank * weight for one, weight in zip(active, weights, strict=True)) / sum(weights)
    highest = max(one.rank for one in found)
    lines += [
        "",
        f"rank {highest} is used to {mean:.1f} of {highest}: effective rank, mean of the layers by their energy",
        f"the largest rank that a layer needs: {max(one.rank_90 for one in active)} for 90 % of its energy, "
        f"{max(one.rank_99 for one in active)} for 99 %",
    ]
    if len(active) < len(found):
        lines.append(f"{len(found) - len(active)} of {len(found)} layers are 0")
    return lines


def table(found: Sequence[Spectrum]) -> str:
    """CSV: a row for each layer, with its singular values in the last columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    most = max(len(one.values) for one in found)
    writer.writerow([*_COLUMNS, *(f"sigma_{place + 1}" for place in range(most))])
    for one in found:
        fields: Mapping[str, object] = vars(one)
        writer.writerow([*(fields[name] for name in _COLUMNS), *one.values])
    return text.getvalue()


def draw(path: Path, found: Sequence[Spectrum], *, title: str) -> None:
    """A picture of the first singular values, and of the energy up to each rank with lines at 90 and 99 %."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any(one.norm for one in found):
        raise UserError(f"--plot {path}: every layer is 0, there is nothing to draw")
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    values, energy = figure.subplots(1, 2)
    for one in found:
        if not one.norm:
            continue
        ranks = np.arange(1, len(one.values) + 1)
        shares = np.cumsum(np.square(one.values)) / np.sum(np.square(one.values))
        positive = np.where(np.array(one.values) > 1e-7 * one.largest, one.values, np.nan)
        values.plot(ranks[:_VALUES_SHOWN], positive[:_VALUES_SHOWN], color="tab:blue", alpha=0.25, linewidth=0.8)
        energy.plot(ranks, 100 * shares, color="tab:blue", alpha=0.25, linewidth=0.8)
    values.set_title(title, parse_math=False)
    values.set(yscale="log", xlabel="number", ylabel="singular value")
    energy.set(xlabel="rank", ylabel="energy, %", title="energy of each layer", ylim=(0, 101))
    for share in (90, 99):
        energy.axhline(share, color="tab:red", linestyle="--", linewidth=1, label=f"{share} %")
    energy.legend(loc="lower right")
    figure.savefig(path, dpi=100, format="png")
