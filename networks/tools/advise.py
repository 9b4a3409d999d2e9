"""How far LoRA files get in each other's way, by layer, and the method of merging that suits them.

Three numbers for each pair of files, of their differences as they are weighted:

cosine     of the two as vectors: 1 the same direction, 0 unrelated, -1 opposite
norms      |first| / |second|, Frobenius
conflicts  where both have one of their largest 20 % of weights: the share of opposite signs; 50 % is chance

The limits below are rules of thumb, not measurements of pictures: they state which formula fits which geometry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from library.files.atomic import replacing
from library.progress import bar
from networks.tools.blocks import block_of, order
from networks.tools.compare import Products, products_of
from networks.tools.low_rank import Factors, same_shape
from networks.tools.methods.ties import trim

DENSITY = 0.2  # that of TIES
ALIKE, AGAINST = 0.5, -0.1  # cosines from which two files are variants of one thing, and up to which they are opposed
CONFLICTS = 0.55  # of the signs: above chance
MANY = 0.25  # the share of layers that are opposed, from which their mean does not count
UNEQUAL = 3.0  # the ratio of norms from which the quieter file is hardly seen


@dataclass
class Overlap:
    """Of one layer, or of several. both: the number of weights that are among the largest of both. opposite: those of
    these with opposite signs."""

    products: Products = field(default_factory=Products)
    both: int = 0
    opposite: int = 0

    def add(self, other: Overlap) -> None:
        """Count another part in."""
        self.products.add(other.products)
        self.both, self.opposite = self.both + other.both, self.opposite + other.opposite

    @property
    def cosine(self) -> float:
        """0 where one of them is 0."""
        return self.products.cosine or 0.0

    @property
    def ratio(self) -> float | None:
        """|first| / |second|; None where one of them is 0."""
        first, second = self.products.first, self.products.second
        return (first / second) ** 0.5 if first > 0 and second > 0 else None

    @property
    def conflicts(self) -> float | None:
        """None where no weight is among the largest of both."""
        return self.opposite / self.both if self.both else None


@dataclass
class Pair:
    """Two files. names: of the files. layers: those that both have."""

    names: tuple[str, str]
    layers: dict[str, Overlap]

    def whole(self) -> Overlap:
        """Over all layers."""
        total = Overlap()
        for one in self.layers.values():
            total.add(one)
        return total

    def opposed(self) -> float:
        """The share of layers that are opposed."""
        return sum(one.cosine <= AGAINST for one in self.layers.values()) / max(1, len(self.layers))


def overlap(first: Factors, second: Factors, where: str) -> Overlap:
    """Of one layer. `UserError`, which begins with `where`, for two shapes."""
    same_shape([first, second], where)
    one, two = trim(first.dense(), DENSITY), trim(second.dense(), DENSITY)
    product = one.sign() * two.sign()
    return Overlap(products_of(first, second), int(product.count_nonzero()), int((product < 0).sum()))


@torch.no_grad()
def pairs_of(names: Sequence[str], files: Sequence[Mapping[str, Factors]]) -> list[Pair]:
    """Each two of the files, layer by layer."""
    found = []
    for first, second in combinations(range(len(files)), 2):
        shared = [name for name in files[first] if name in files[second]]
        rows = bar(shared, desc=f"{names[first]}, {names[second]}", unit="layer")
        layers = {name: overlap(files[first][name], files[second][name], name) for name in rows}
        found.append(Pair((names[first], names[second]), layers))
    return found


def report(pairs: Sequence[Pair]) -> Iterator[str]:
    """Lines: a table by block for each pair, then the advice."""
    for pair in pairs:
        yield f"{pair.names[0]} and {pair.names[1]}: {len(pair.layers)} layers in both"
        if not pair.layers:
            continue
        blocks: dict[str, Overlap] = {}
        for name, one in pair.layers.items():
            blocks.setdefault(block_of(name), Overlap()).add(one)
        rows = {block: blocks[block] for block in sorted(blocks, key=order)} | {"all": pair.whole()}
        width = max(map(len, rows))
        yield f"{'':<{width}}  {'cosine':>8} {'norms':>9} {'conflicts':>10}"
        for block, one in rows.items():
            ratio = "-" if one.ratio is None else f"{one.ratio:.3g}"
            share = "-" if one.conflicts is None else f"{100 * one.conflicts:.1f} %"
            yield f"{block:<{width}}  {one.cosine:>8.4f} {ratio:>9} {share:>10}"
    yield ""
    yield from advice(pairs)


def advice(pairs: Sequence[Pair]) -> Iterator[str]:
    """The method that suits these files, and the reason."""
    method, reason = _method([pair for pair in pairs if pair.layers], len(pairs) == 1)
    yield f"--method {method}: {reason}"
    for pair in pairs:
        ratio = pair.whole().ratio
        if ratio is not None and not 1 / UNEQUAL <= ratio <= UNEQUAL:
            loud, quiet = pair.names if ratio > 1 else pair.names[::-1]
            factor = max(ratio, 1 / ratio)
            yield (
                f"{loud} changes the model {factor:.1f} times as much as {quiet} (limit {UNEQUAL:g}): lower its "
                f"weight; {1 / factor:.2g} of what it is makes the norms equal"
            )


def _method(pairs: Sequence[Pair], two: bool) -> tuple[str, str]:
    if not pairs:
        return "linear", "the files have no layer in common, so that their sum holds each as it is"
    wholes = [(pair, pair.whole()) for pair in pairs]
    worst = min(wholes, key=lambda one: one[1].cosine)
    for pair, whole in wholes:
        words = f"{pair.names[0]} and {pair.names[1]}"
        conflicts, opposed = whole.conflicts or 0.0, pair.opposed()
        if whole.cosine <= AGAINST or conflicts > CONFLICTS or opposed > MANY:
            return "ties", (
                f"{words} work against each other (cosine {whole.cosine:.2f}, limit {AGAINST:g}; conflicts "
                f"{100 * conflicts:.0f} %, limit {100 * CONFLICTS:.0f} %; {100 * opposed:.0f} % of the layers opposed, "
                f"limit {100 * MANY:.0f} %): a sum would cancel what is opposed, TIES takes the stronger side"
            )
    alike = max(wholes, key=lambda one: one[1].cosine)
    if alike[1].cosine >= ALIKE:
        words = f"{alike[0].names[0]} and {alike[0].names[1]} point the same way (cosine {alike[1].cosine:.2f}"
        words += f", limit {ALIKE:g}), so that their sum is too strong"
        if two:
            return "slerp", f"{words}; on the arc between them the strength stays"
        return "linear", f"{words}; give weights that add up to 1"
    least = f"{worst[1].cosine:.2f} to " if len(wholes) > 1 else ""
    words = f"cosine {least}{alike[1].cosine:.2f}, limits {AGAINST:g} and {ALIKE:g}"
    return "linear", f"the files hardly overlap ({words}): the sum keeps them all"


def plot(path: Path, pairs: Sequence[Pair]) -> None:
    """A PNG with the three numbers by layer, in the order of the model, and the limits of the advice as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    names = sorted({name for pair in pairs for name in pair.layers}, key=lambda name: (order(block_of(name)), name))
    places = {name: place for place, name in enumerate(names)}
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    cosines, ratios, conflicts = grid = figure.subplots(3, 1, sharex=True)
    for number, pair in enumerate(pairs):
        style = {"marker": ".", "linestyle": "", "color": f"C{number % 10}", "label": " and ".join(pair.names)}
        at = [places[name] for name in pair.layers]
        own = list(pair.layers.values())
        cosines.plot(at, [one.cosine for one in own], **style)
        ratios.plot(at, [float("nan") if one.ratio is None else one.ratio for one in own], **style)
        shares = [float("nan") if one.conflicts is None else 100 * one.conflicts for one in own]
        conflicts.plot(at, shares, **style)
    ratios.set_yscale("log")
    ratios.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ratios.yaxis.set_major_formatter("{x:.2g}")
    ratios.yaxis.set_minor_locator(NullLocator())
    limits = ((cosines, (AGAINST, ALIKE)), (ratios, (1 / UNEQUAL, UNEQUAL)), (conflicts, (100 * CONFLICTS,)))
    for axes, lines in limits:
        for line in lines:
            axes.axhline(line, color="0.6", linewidth=1, linestyle="--")
        axes.grid(axis="y", color="0.92")
    cosines.set(ylabel="cosine", ylim=(-1.05, 1.05))
    ratios.set_ylabel("|first| / |second|")
    conflicts.set(ylabel="opposite signs, %", ylim=(-2, 102))
    _mark_blocks(grid, names)
    handles, labels = cosines.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=100, format="png")


def _mark_blocks(grid: Sequence[Any], names: Sequence[str]) -> None:
    """A line at each block's first layer, with its name below."""
    starts = [place for place, name in enumerate(names) if not place or block_of(name) != block_of(names[place - 1])]
    for axes in grid:
        for start in starts:
            axes.axvline(start - 0.5, color="0.9", linewidth=0.8, zorder=0)
    grid[-1].set_xticks(starts, [block_of(names[start]) for start in starts], rotation=60, ha="right", fontsize=7)
