"""What do the formats of frozen weights cost in quality? LoRAs of the quickstart's style on a base held in each,
beside unrounded weights, judged on images that no training saw.

    python -m benchmarks.format_quality                   # runs what is missing (an hour on two cores), reports
    python -m benchmarks.format_quality --report          # the table of the finished runs
    python -m benchmarks.format_quality --only nf4

How the rates are chosen, the runs paired and the losses taken: benchmarks/study.py. The losses are those of the LoRA on
the base as it was trained on, in its format: as a user of the same format sees it. All is computed in fp32, so that
the only difference is the rounding of the weights; fp8, which needs bf16 to compute in, is left out. Each finished run
is one row of benchmarks/results/format_quality.csv, so an interrupted study continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks import study
from library.quantization import FORMATS

RESULTS = study.ROOT / "benchmarks" / "results" / "format_quality.csv"


@dataclass(frozen=True)
class Variant:
    """A format. `middle`: the rate that the grid is laid around, LoRA's."""

    name: str
    middle: float = 2e-3

    @property
    def filed(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def words(self) -> list[str]:
        """Its part of the command line."""
        return [
            *("--network_module", "networks.lora", "--network_dim", "16", "--network_alpha", "16"),
            *("--optimizer_type", "AdamW", "--mixed_precision", "no"),
            *(() if self == REFERENCE else ("--base_format", self.name)),
        ]


REFERENCE = Variant("none")
VARIANTS = [REFERENCE, *(Variant(name) for name in FORMATS if name != "fp8")]


@dataclass(frozen=True)
class Row:
    """One finished run: see `study.Row`."""

    format: str
    rate: float
    seed: int
    steps: int
    validation: float
    report: float
    seconds: float

    @property
    def filed(self) -> tuple[str, ...]:
        return (self.format,)


def run(variant: Variant, rate: float, seed: int) -> Row:
    """One training run."""
    outcome = study.train_and_judge(study.STYLE, rate, seed, *variant.words)
    return Row(
        format=variant.name,
        rate=rate,
        seed=seed,
        steps=study.STEPS,
        validation=outcome.validation,
        report=outcome.report,
        seconds=outcome.seconds,
    )


def report(variants: Sequence[Variant], rows: Mapping[study.Key, Row]) -> None:
    """Print the table of the finished runs."""
    found = [
        result
        for variant in variants
        if (result := study.compare(variant, REFERENCE, rows, words=("better", "worse"))) is not None
    ]
    if not found:
        print("nothing to compare yet: two finished seeds of a format and of unrounded weights are needed")
        return
    head = ("", "rate", "loss, report images", "difference, % (95 % interval)", "")
    lines = [(r.variant.name, f"{r.rate:g}", f"{r.loss:.5f}", r.interval, r.verdict) for r in found]
    print(f"{study.hours(rows)}\n\n{study.markdown(head, lines)}")


def main() -> None:
    options = study.parser(__doc__).parse_args()
    variants = [REFERENCE, *study.named(VARIANTS[1:], options.only)]
    rows = study.read_rows(RESULTS, Row)
    study.complete(variants, rows, run, RESULTS, options)
    report(variants, rows)


if __name__ == "__main__":
    main()
