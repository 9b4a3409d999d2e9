"""Does CustomAdamW earn its place? LoRA fine-tunes of the shipped base model on the shipped style, and of the
variants that promise most on another one, judged on images that no training saw.

    python -m benchmarks.optimizer_quality             # runs what is missing (hours on two cores), then reports
    python -m benchmarks.optimizer_quality --report    # the table and the plot of what is there

How the rates are chosen, the runs paired and the losses taken: benchmarks/study.py. Each finished run is one row of
benchmarks/results/optimizer_quality.csv, so an interrupted study continues where it stopped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from benchmarks import study
from benchmarks.adapter_quality import STYLES
from library.config.registry import Arguments

RESULTS = study.ROOT / "benchmarks" / "results" / "optimizer_quality.csv"
NETWORK = ("--network_module", "networks.lora", "--network_dim", "16", "--network_alpha", "16")
DORA = ("--network_module", "networks.dora")
MIDDLE = 2e-3

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
    "orthogonalize": ("orthogonalize_scale",),
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
    "orthogonalize": "Muon",
}
ADAMW, NOTHING, SHIPPED = "AdamW", "CustomAdamW, nothing on", "CustomAdamW as shipped"
AT_SCALE_1: dict[str, bool | float] = {"orthogonalize": True, "orthogonalize_scale": 1.0}
# 1000 steps, its default, are more than a run of this study has
SHORT = {"wd_transition_steps": study.STEPS // 5}


@dataclass(frozen=True)
class Variant:
    """An optimizer with its settings. `settings`: those of CustomAdamW that differ from what is shipped. `words`: more
    of the command line."""

    name: str
    kind: str
    optimizer: str = "CustomAdamW"
    settings: Mapping[str, bool | float] = field(default_factory=dict)
    style: str = "quickstart"
    words: tuple[str, ...] = ()

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

    @property
    def filed(self) -> tuple[str, ...]:
        return self.style, self.optimizer, self.techniques, " ".join(self.words)

    @property
    def middle(self) -> float:
        return MIDDLE


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
    everything: dict[str, bool | float] = {**dict.fromkeys(TECHNIQUES, True), "orthogonalize": False}
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
        *(
            Variant(f"{TITLES[s]} alone", "alone", settings={**off, s: True} | SHORT)
            for s in TECHNIQUES
            if s != "orthogonalize"  # at its default scale it is the row below at half of the scale and twice the rate
        ),
        Variant("Muon alone, orthogonalize_scale 1", "whole", settings={**off, **AT_SCALE_1}),
        Variant("the defaults with Muon", "whole", settings={"orthogonalize": True}),
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
        Variant("the defaults with Muon, on a DoRA", "whole", settings={"orthogonalize": True}, words=DORA),
        *_on_another_style(off),
    ]


def _on_another_style(off: Mapping[str, bool | float]) -> Iterator[Variant]:
    muon = {**off, **AT_SCALE_1}
    for name, kind, optimizer, settings, words in (
        (ADAMW, "peer", ADAMW, {}, ()),
        (SHIPPED, "whole", "CustomAdamW", {}, ()),
        ("the defaults with Muon", "whole", "CustomAdamW", {"orthogonalize": True}, ()),
        ("Muon alone, orthogonalize_scale 1", "whole", "CustomAdamW", muon, ()),
        ("the defaults with Muon, on a DoRA", "whole", "CustomAdamW", {"orthogonalize": True}, DORA),
    ):
        yield Variant(f"twemoji: {name}", kind, optimizer, settings, "twemoji", words)


@dataclass(frozen=True)
class Row:
    """One finished run: see `study.Row`."""

    style: str
    optimizer: str
    techniques: str
    words: str
    rate: float
    seed: int
    steps: int
    validation: float
    report: float
    seconds: float

    @property
    def filed(self) -> tuple[str, ...]:
        return self.style, self.optimizer, self.techniques, self.words


def run(variant: Variant, rate: float, seed: int) -> Row:
    """One training run, of a LoRA of rank 16."""
    given = [f"{name}={value}" for name, value in variant.settings.items()]
    more = ("--optimizer_type", variant.optimizer, *(("--optimizer_args", *given) if given else ()))
    outcome = study.train_and_judge(STYLES[variant.style], rate, seed, *NETWORK, *more, *variant.words)
    style, optimizer, techniques, words = variant.filed
    return Row(
        style=style,
        optimizer=optimizer,
        techniques=techniques,
        words=words,
        rate=rate,
        seed=seed,
        steps=study.STEPS,
        validation=outcome.validation,
        report=outcome.report,
        seconds=outcome.seconds,
    )


def main() -> None:
    options = study.parser(__doc__).parse_args()
    wanted = study.named(variants(), options.only)
    rows = study.read_rows(RESULTS, Row)
    study.complete(wanted, rows, run, RESULTS, options)
    from benchmarks.quality_report import report

    report(wanted, rows)


if __name__ == "__main__":
    main()
