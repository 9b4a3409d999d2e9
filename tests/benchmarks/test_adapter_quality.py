"""The study of kinds of adapters: its variants are ones that the trainer takes, and equal in size where it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import adapter_quality, study
from library.models.opening import open_family
from networks import kinds
from networks.create import create
from networks.settings import Asked


def test_the_styles_have_splits_of_different_things():
    for folder in adapter_quality.STYLES.values():
        captions = [
            {path.with_suffix(".txt").read_text(encoding="utf-8") for path in study.paths_in(folder / split)}
            for split in ("train", "validation", "report")
        ]
        assert [len(found) for found in captions] == [160, 60, 120]
        assert len(set.union(*captions)) == 340


def test_each_variant_is_one_that_the_trainer_makes_and_equal_ones_have_as_many_numbers():
    family = open_family(str(study.ROOT / "quickstart" / "base"))
    counts = {}
    with family.outlined(), torch.no_grad():
        for variant in adapter_quality.variants("quickstart"):
            kind = kinds.kind_of(variant.module)
            assert kind is not None
            arguments, _ = kinds.arguments(variant.module, variant.args, from_file=False)
            network = create(kind, family.adapter_targets(), Asked(dim=variant.dim, alpha=variant.alpha), arguments)
            counts[variant] = sum(network.parameter_counts().values())
    reference, *others = counts
    for variant in others:
        if variant.kind == "equal":
            assert counts[variant] == pytest.approx(counts[reference], rel=0.1), variant.name
    assert len({variant.filed for variant in counts}) == len(counts)
    assert not {v.filed for v in counts} & {v.filed for v in adapter_quality.variants("twemoji")}


def row(variant: adapter_quality.Variant, power: int, seed: int, loss: float) -> adapter_quality.Row:
    style, module, dim, alpha, args = variant.filed
    rate = study.rate(variant, power)
    return adapter_quality.Row(style, module, dim, alpha, args, rate, seed, study.STEPS, 559104, loss, loss, 1.0)


def test_the_report_has_a_table_for_each_style(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(adapter_quality, "PLOT", tmp_path / "plot.png")
    wanted = {style: adapter_quality.variants(style)[:2] for style in adapter_quality.STYLES}
    rows = {}
    for place, variant in enumerate(wanted["twemoji"]):
        made = [row(variant, power, 0, 1 + abs(power)) for power in study.GRID]
        made += [row(variant, 0, seed, 1 + 0.1 * seed - 0.02 * place - 0.001 * seed * place) for seed in (1, 2, 3)]
        rows |= {study.key_of(each): each for each in made}
    adapter_quality.report(wanted, rows)
    said = capsys.readouterr().out
    assert "quickstart: nothing to compare yet" in said
    assert "| DoRA, rank 16 | equal | 559,104 | 0.002 | 1.17800 | -1.83 (-2.04 … -1.63) | better |" in said
    assert (tmp_path / "plot.png").stat().st_size > 5_000
