"""The study of optimizers: what its rows are filed under, and its report from the finished runs."""

from __future__ import annotations

from pathlib import Path

from benchmarks import optimizer_quality, quality_report, study


def test_rows_are_filed_under_what_is_on():
    names = {variant.name: variant for variant in optimizer_quality.variants()}
    assert names[optimizer_quality.NOTHING].techniques == ""
    assert names["SPD alone"].techniques == f"spd:spd_lambda={optimizer_quality.shipped()['spd_lambda']:g}"
    left_out = names["without Cautious"].techniques.split()
    assert sorted([*left_out, "cautious"]) == sorted(names[optimizer_quality.SHIPPED].techniques.split())


def test_the_plot_is_drawn_from_what_is_there(tmp_path: Path):
    rows = study.read_rows(optimizer_quality.RESULTS, optimizer_quality.Row)
    found = quality_report.results(optimizer_quality.variants(), rows)
    study.plot(quality_report.panels(found), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert optimizer_quality.ADAMW in quality_report.table(found, split="report")
