"""--dry_run=curves: the curves that are drawn are those that a run has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.config.options.schedule import ScheduleOptions
from library.guidance import preview
from library.optimizers.create import choose_optimizer
from library.optimizers.schedules import choose_schedule
from library.optimizers.weight_decay import Curve
from library.optimizers.weight_decay_choice import DecayChoice
from library.optimizers.weight_decay_pace import Pace
from library.run.curves import Curves

GROUPS = [{"name": "unet", "lr": 0.0, "initial_lr": 1e-3}, {"name": "text_encoder", "lr": 5e-4}]


def curves(decay: DecayChoice | None = None, optimizer: str = "AdamW", **schedule: Any) -> Curves:
    chosen = choose_schedule(ScheduleOptions(**schedule), total_steps=100)
    return Curves(chosen, decay, choose_optimizer(optimizer, []))


def test_rates_follow_the_schedule_from_the_configured_ones() -> None:
    found = preview.preview(curves(lr_scheduler="linear", lr_warmup_steps=10), GROUPS, steps=100)
    assert found.rates["unet"][0] == 0
    assert found.rates["unet"][10] == 1e-3  # step 11, after ten of warm-up
    assert found.rates["text_encoder"][55] == pytest.approx(2.5e-4)
    assert found.decays == [0.01] * 100


def test_the_weight_decay_follows_its_curve() -> None:
    curve = Curve(transition_steps=20)
    found = preview.preview(curves(DecayChoice(curve)), GROUPS, steps=100)
    assert found.decays == [0.01 * curve.factor(step) for step in range(1, 101)]


def test_it_follows_the_rate_where_it_is_coupled() -> None:
    decay = DecayChoice(Curve(transition_steps=1000), pace=Pace(with_rate=True))
    found = preview.preview(curves(decay, lr_scheduler="cosine"), GROUPS, steps=100)
    assert found.decays == pytest.approx([0.01] * 100)  # the rate falls, the curve does not: min(c, r) / r = 1


def test_an_adaptive_one_falls_at_the_earliest() -> None:
    decay = DecayChoice(Curve("adaptive", transition_steps=20), flat={"window": 10, "earliest": 30})
    found = preview.preview(curves(decay), GROUPS, steps=100)
    assert found.decays is not None
    assert next(step for step, value in enumerate(found.decays, 1) if value < 0.01) == 31
    assert "at the earliest" in found.notes[0]


def test_without_a_weight_decay() -> None:
    assert preview.preview(curves(optimizer="Rprop"), GROUPS, steps=5).decays is None


def test_groups_with_one_curve_share_a_line() -> None:
    rates = {f"block {n}": [1e-3, 2e-3] for n in range(5)} | {"text": [1e-4, 2e-4]}
    assert [names for names, _ in preview._lines(rates)] == ["block 0, block 1, block 2, …", "text"]
    steps, values = preview._points(list(range(10_001)))
    assert len(steps) <= 2 * preview._POINTS
    assert values == [step - 1 for step in steps]


@pytest.mark.slow
def test_a_dry_run_draws_what_the_run_then_does(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[preview.Preview] = []
    real = preview.draw
    monkeypatch.setattr(
        preview, "draw", lambda path, found, title: seen.append(found) or real(path, found, title=title)
    )
    words = ("--max_train_steps", "6", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2", "--dynamic_weight_decay")
    words = (*words, "--wd_transition_steps", "2", "--monitor_every_n_steps", "1")
    for _ in range(2):  # an earlier picture is replaced
        assert train(*words, "--dry_run=curves") == 0
    path = tmp_path / "out" / "test-curves.png"
    assert list((tmp_path / "out").iterdir()) == [path]
    with Image.open(path) as image:
        assert image.size[0] > 500
    assert f"nothing was trained, the curves are in {path}." in capsys.readouterr().out
    assert train(*words) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "test-metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["rates"]["unet"] for line in steps] == pytest.approx(seen[-1].rates["unet"])
    assert [line["weight_decay"]["all"] for line in steps] == pytest.approx(seen[-1].decays)
