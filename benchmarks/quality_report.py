"""The table and the plot of `benchmarks.optimizer_quality`: paired differences with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.optimizer_quality import (
    ADAMW,
    CHOOSING_SEED,
    NOTHING,
    SHIPPED,
    Key,
    Row,
    Variant,
    best_power,
    rate,
    tried,
)

PLOT = Path(__file__).parent.parent / "docs" / "images" / "optimizer-quality.png"
# Student's t, 97.5 %, by degrees of freedom
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 11: 2.201, 14: 2.145}
# The reference of each kind of variant, and the verdicts for an interval below or above zero.
REFERENCES = {"peer": ADAMW, "whole": ADAMW, "alone": NOTHING, "left out": SHIPPED, "added": SHIPPED}
VERDICTS = {"left out": ("does harm", "pays")}


@dataclass(frozen=True)
class Result:
    """A variant beside its reference. Differences are in percent of the reference's loss, negative is better."""

    variant: Variant
    reference: str
    rate: float
    loss: float
    difference: float
    margin: float
    """Half of the 95 % interval."""
    seeds: int
    at_the_references_rate: float
    """Difference on the validation images, one seed, both at the rate that suits the reference; nan if not tried."""

    @property
    def verdict(self) -> str:
        better, worse = VERDICTS.get(self.variant.kind, ("pays", "does harm"))
        if self.seeds < 2 or self.variant.name == self.reference:
            return ""
        if self.difference + self.margin < 0:
            return better
        return worse if self.difference - self.margin > 0 else "no difference seen"


def finished(variant: Variant, rows: Mapping[Key, Row]) -> dict[int, Row]:
    """Seed → run at the chosen rate."""
    power = best_power(variant, rows)
    if power is None:
        return {}
    return {
        row.seed: row
        for row in rows.values()
        if (row.optimizer, row.techniques, row.rate) == (variant.optimizer, variant.techniques, rate(power))
        and row.seed != CHOOSING_SEED
    }


def compare(variant: Variant, reference: Variant, rows: Mapping[Key, Row], *, split: str = "report") -> Result | None:
    """Paired by seed. None while either has fewer than two seeds in common or no rate yet."""
    ours, theirs = finished(variant, rows), finished(reference, rows)
    common = sorted(set(ours) & set(theirs))
    if len(common) < 2:
        return None
    losses = [(getattr(ours[seed], split), getattr(theirs[seed], split)) for seed in common]
    level = statistics.mean(other for _, other in losses)
    differences = [100 * (own - other) / level for own, other in losses]
    spread = statistics.stdev(differences)
    degrees = max(key for key in T if key <= len(common) - 1)
    own_power, other_power = best_power(variant, rows), best_power(reference, rows)
    assert own_power is not None
    assert other_power is not None
    same_rate = tried(variant, rows).get(other_power, math.nan) / tried(reference, rows)[other_power] - 1
    return Result(
        variant=variant,
        reference=reference.name,
        rate=rate(own_power),
        loss=statistics.mean(own for own, _ in losses),
        difference=statistics.mean(differences),
        margin=T[degrees] * spread / math.sqrt(len(common)),
        seeds=len(common),
        at_the_references_rate=100 * same_rate,
    )


def results(variants: Sequence[Variant], rows: Mapping[Key, Row], *, split: str = "report") -> list[Result]:
    by_name = {variant.name: variant for variant in variants}
    found = (
        compare(variant, by_name[REFERENCES[variant.kind]], rows, split=split)
        for variant in variants
        if REFERENCES[variant.kind] in by_name
    )
    return [result for result in found if result is not None]


def table(found: Sequence[Result], *, split: str) -> str:
    lines = [
        f"| | rate | loss, {split} images | compared with | difference, % (95 % interval) | | at that one's rate, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found:
        if r.variant.name == r.reference:
            difference, verdict, same = "", "", ""
        else:
            difference = f"{r.difference:+.2f} ({r.difference - r.margin:+.2f} … {r.difference + r.margin:+.2f})"
            verdict = r.verdict
            same = "not tried" if math.isnan(r.at_the_references_rate) else f"{r.at_the_references_rate:+.1f}"
        cells = (r.variant.name, f"{r.rate:g}", f"{r.loss:.5f}", r.reference, difference, verdict, same)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: Sequence[Result], path: Path) -> None:
    """Differences with their intervals, a panel for each reference."""
    from matplotlib.figure import Figure

    panels = {
        reference: [r for r in found if r.reference == reference and r.variant.name != reference]
        for reference in dict.fromkeys(r.reference for r in found)
    }
    panels = {reference: members for reference, members in panels.items() if members}
    heights = [len(members) + 1 for members in panels.values()]
    figure = Figure(figsize=(8, 0.28 * sum(heights) + 1.2), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    colours = {"pays": "tab:green", "does harm": "tab:red"}
    for axis, (reference, members) in zip(axes, panels.items(), strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        for place, r in enumerate(members):
            colour = colours.get(r.verdict, "0.35")
            axis.errorbar(r.difference, place, xerr=r.margin, fmt="o", color=colour, capsize=3, markersize=4)
        axis.set_yticks(range(len(members)), [r.variant.name for r in members], fontsize=8)
        axis.set_ylim(len(members) - 0.4, -0.6)
        axis.set_title(f"compared with {reference}", fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1].set_xlabel("difference of the held-out loss, % (left is better; 95 % interval)", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def report(variants: Sequence[Variant], rows: Mapping[Key, Row]) -> None:
    """Print the tables and draw the plot of the finished runs."""
    found = results(variants, rows)
    if not found:
        print("nothing to compare yet: two finished seeds of a variant and of its reference are needed")
        return
    seconds = sum(row.seconds for row in rows.values())
    print(f"{len(rows)} runs of {next(iter(rows.values())).steps} steps, {seconds / 3600:.1f} hours of one thread.\n")
    print(table(found, split="report"))
    print("\nThe same on the validation images, by which rates and defaults were chosen:\n")
    print(table(results(variants, rows, split="validation"), split="validation"))
    plot(found, PLOT)
    print(f"\nplot: {PLOT.relative_to(Path.cwd()) if PLOT.is_relative_to(Path.cwd()) else PLOT}")
