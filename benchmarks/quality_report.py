"""The table and the plot of `benchmarks.optimizer_quality`: paired differences with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks import study
from benchmarks.optimizer_quality import ADAMW, NOTHING, SHIPPED, Row, Variant

PLOT = study.ROOT / "docs" / "images" / "optimizer-quality.png"
# The reference of each kind of variant, and the verdicts for an interval below or above zero.
REFERENCES = {"peer": ADAMW, "whole": ADAMW, "alone": NOTHING, "left out": SHIPPED, "added": SHIPPED}
VERDICTS = {"left out": ("does harm", "pays")}

Result = study.Result[Variant]


def results(variants: Sequence[Variant], rows: Mapping[study.Key, Row], *, split: str = "report") -> list[Result]:
    by_name = {variant.name: variant for variant in variants}
    found = (
        study.compare(
            variant,
            by_name[reference(variant)],
            rows,
            split=split,
            words=VERDICTS.get(variant.kind, ("pays", "does harm")),
        )
        for variant in variants
        if reference(variant) in by_name
    )
    return [result for result in found if result is not None]


def reference(variant: Variant) -> str:
    """The name of the variant that one is compared with, of the same style."""
    style, colon, _ = variant.name.rpartition(": ")
    return style + colon + REFERENCES[variant.kind]


def table(found: Sequence[Result], *, split: str) -> str:
    of_losses = ("compared with", "difference, % (95 % interval)", "", "at that one's rate, %")
    lines = []
    for r in found:
        same = "not tried" if math.isnan(r.at_the_references_rate) else f"{r.at_the_references_rate:+.1f}"
        compared = (r.reference.name, r.interval, r.verdict, "" if r.is_reference else same)
        lines.append((r.variant.name, f"{r.rate:g}", f"{r.loss:.5f}", *compared))
    return study.markdown(("", "rate", f"loss, {split} images", *of_losses), lines)


def panels(found: Sequence[Result]) -> dict[str, list[Result]]:
    """The plot's panels, one for each reference."""
    found_for = {
        f"compared with {name}": [r for r in found if r.reference.name == name and not r.is_reference]
        for name in dict.fromkeys(r.reference.name for r in found)
    }
    return {title: members for title, members in found_for.items() if members}


def report(variants: Sequence[Variant], rows: Mapping[study.Key, Row]) -> None:
    """Print the tables and draw the plot of the finished runs."""
    found = results(variants, rows)
    if not found:
        print("nothing to compare yet: two finished seeds of a variant and of its reference are needed")
        return
    print(f"{study.hours(rows)}\n")
    print(table(found, split="report"))
    print("\nThe same on the validation images, by which rates and defaults were chosen:\n")
    print(table(results(variants, rows, split="validation"), split="validation"))
    study.plot(panels(found), PLOT)
    print(f"\nplot: {study.shown_path(PLOT)}")
