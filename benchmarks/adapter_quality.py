"""Which kind of adapter pays? Fine-tunes of the shipped base model on two drawing styles, each kind beside a LoRA of
rank 16, judged on images that no training saw.

    python -m benchmarks.adapter_quality                      # runs what is missing (many hours on two cores), reports
    python -m benchmarks.adapter_quality --report             # the tables and the plot of the finished runs
    python -m benchmarks.adapter_quality --style twemoji --only DoRA LoKr

"equal": kinds with as many trained numbers as the reference, within 10 %. "usual": the settings that users of the kind
take, whatever their number. How the rates are chosen, the runs paired and the losses taken: benchmarks/study.py. Each
finished run is one row of benchmarks/results/adapter_quality.csv, so an interrupted study continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks import study

RESULTS = study.ROOT / "benchmarks" / "results" / "adapter_quality.csv"
PLOT = study.ROOT / "docs" / "images" / "adapter-quality.png"
STYLES = {"quickstart": study.STYLE, "twemoji": study.ROOT / "benchmarks" / "data" / "twemoji"}
MIDDLE = 2e-3  # LoRA's


@dataclass(frozen=True)
class Variant:
    """A kind with its sizes on one style. `dim`, `alpha`: None where the kind has none or its default is meant.
    `middle`: the rate that the grid is laid around."""

    name: str
    kind: str
    module: str
    dim: int | None = None
    alpha: float | None = None
    args: tuple[str, ...] = ()
    middle: float = MIDDLE
    style: str = "quickstart"

    @property
    def filed(self) -> tuple[str, ...]:
        return self.style, self.module, _text(self.dim), _text(self.alpha), " ".join(self.args)

    @property
    def words(self) -> list[str]:
        """Its part of the command line."""
        return [
            *("--network_module", self.module, "--optimizer_type", "AdamW"),
            *(("--network_dim", str(self.dim)) if self.dim is not None else ()),
            *(("--network_alpha", f"{self.alpha:g}") if self.alpha is not None else ()),
            *(("--network_args", *self.args) if self.args else ()),
        ]


@dataclass(frozen=True)
class Row:
    """One finished run: see `study.Row`. `parameters`: trained numbers at the start of the run."""

    style: str
    module: str
    dim: str
    alpha: str
    args: str
    rate: float
    seed: int
    steps: int
    parameters: int
    validation: float
    report: float
    seconds: float

    @property
    def filed(self) -> tuple[str, ...]:
        return self.style, self.module, self.dim, self.alpha, self.args


Result = study.Result[Variant]


def _text(number: float | None) -> str:
    return "" if number is None else f"{number:g}"


def variants(style: str) -> list[Variant]:
    """In the order in which they are run: what decides the defaults first."""

    def of(
        name: str, kind: str, module: str, dim: int | None, alpha: float | None, *args: str, middle: float = MIDDLE
    ) -> Variant:
        return Variant(name, kind, f"networks.{module}", dim, alpha, args, middle, style)

    return [
        of("LoRA, rank 16", "reference", "lora", 16, 16),
        of("DoRA, rank 16", "equal", "dora", 16, 16),
        of("DoRA of rows, rank 16", "equal", "dora", 16, 16, "wd_on_output=True"),
        of("LoKr, factor 8", "usual", "lokr", 16, 16, "factor=8", middle=8e-3),
        of("LoHa, rank 8", "equal", "loha", 8, 8, middle=4e-3),
        of("rsLoRA, rank 16", "equal", "lora", 16, 16, "rs_lora=True", middle=1e-3),
        of("PiSSA, rank 16", "equal", "pissa", 16, 16, middle=1e-3),
        of("full difference", "usual", "full", None, None, middle=8e-4),
        of("OFT, 4 blocks", "usual", "oft", 4, None, middle=2e-3),
        of("LoKr, factor 2, whole factors", "equal", "lokr", 16, 16, "factor=2", "full_matrix=True", middle=4e-3),
        of("GLoRA, rank 8", "equal", "glora", 8, 8),
        of("AdaLoRA, rank 16 to 11", "equal", "adalora", 11, 11, "init_r=16", middle=1.6e-2),
        of("LoRA-FA, rank 28", "equal", "lora_fa", 28, 28, middle=2e-3),
        of("DyLoRA, rank 16", "equal", "dylora", 16, 16, middle=4e-3),
        of("T-LoRA, rank 16", "equal", "t_lora", 16, 16),
        of("BOFT, blocks of 8", "usual", "boft", 8, None, middle=1e-3),
        of("(IA)³", "usual", "ia3", None, None, middle=6e-2),
        of("VeRA, rank 256", "usual", "vera", 256, None, middle=3e-2),
        of("LoHa, rank 16", "usual", "loha", 16, 16, middle=2e-3),
        of("AdaLoRA, rank 24 to 16", "usual", "adalora", 16, 16, middle=1.6e-2),
    ]


def run(variant: Variant, rate: float, seed: int) -> Row:
    """One training run."""
    outcome = study.train_and_judge(STYLES[variant.style], rate, seed, *variant.words)
    style, module, dim, alpha, args = variant.filed
    return Row(
        style=style,
        module=module,
        dim=dim,
        alpha=alpha,
        args=args,
        rate=rate,
        seed=seed,
        steps=study.STEPS,
        parameters=outcome.parameters,
        validation=outcome.validation,
        report=outcome.report,
        seconds=outcome.seconds,
    )


# --- the report -------------------------------------------------------------------------------------------------------


def results(variants: Sequence[Variant], rows: Mapping[study.Key, Row], *, split: str = "report") -> list[Result]:
    """Each beside the first, the reference."""
    found = (study.compare(v, variants[0], rows, split=split, words=("better", "worse")) for v in variants)
    return [result for result in found if result is not None]


def table(found: Sequence[Result], rows: Mapping[study.Key, Row], *, split: str) -> str:
    """A line for each variant."""
    parameters = {row.filed: row.parameters for row in rows.values()}
    head = ("", "size", "trained numbers", "rate", f"loss, {split} images", "difference, % (95 % interval)", "")
    lines = [
        (
            *(r.variant.name, r.variant.kind, f"{parameters[r.variant.filed]:,}"),
            *(f"{r.rate:g}", f"{r.loss:.5f}", r.interval, r.verdict),
        )
        for r in found
    ]
    return study.markdown(head, lines)


def report(wanted: Mapping[str, Sequence[Variant]], rows: Mapping[study.Key, Row]) -> None:
    """Print the tables of each style and draw the plot of the finished runs."""
    panels = {}
    for style, members in wanted.items():
        found = results(members, rows)
        if not found:
            print(f"{style}: nothing to compare yet: two finished seeds of a variant and of the reference are needed")
            continue
        own = {key: row for key, row in rows.items() if row.style == style}
        print(f"{style}: {study.hours(own)}\n\n{table(found, rows, split='report')}")
        print("\nThe same on the validation images, by which the rates were chosen:\n")
        print(table(results(members, rows, split="validation"), rows, split="validation") + "\n")
        if others := [result for result in found if not result.is_reference]:
            panels[f"{style}, compared with {members[0].name}"] = others
    if panels:
        study.plot(panels, PLOT)
        print(f"plot: {study.shown_path(PLOT)}")


def main() -> None:
    parser = study.parser(__doc__)
    parser.add_argument("--style", choices=tuple(STYLES), help="one style alone (default: both)")
    options = parser.parse_args()
    wanted = {}
    for style in [options.style] if options.style else STYLES:
        reference, *others = variants(style)
        wanted[style] = [reference, *study.named(others, options.only)]
    rows = study.read_rows(RESULTS, Row)
    study.complete([variant for members in wanted.values() for variant in members], rows, run, RESULTS, options)
    report(wanted, rows)


if __name__ == "__main__":
    main()
