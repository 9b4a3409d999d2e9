"""The weight-decay curve through the real command line: what is trained with, and what the file says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import library.training.loop as loop
from tests.quick import quick

CURVE = (
    "--dynamic_weight_decay",
    "--wd_schedule",
    "linear",
    "--wd_transition_steps",
    "25%",
    "--wd_max_progress",
    "inf",
)


def metadata(tmp_path: Path) -> dict[str, str]:
    with safe_open(tmp_path / "out" / "test.safetensors", "pt") as file:
        return {
            key: value for key, value in file.metadata().items() if "weight_decay" in key or key.startswith("ss_wd")
        }


@pytest.fixture
def decays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The weight decay in effect in each step."""
    seen: list[float] = []
    step = loop.optimizer_step

    def watched(run: Any, item: Any) -> Any:
        done = step(run, item)
        optimizer = run.optimizer.optimizer
        if hasattr(optimizer, "get_optimization_info"):
            seen.append(optimizer.get_optimization_info()["weight_decay"][0])
        else:
            seen.append(optimizer.param_groups[0]["weight_decay"])
        return done

    monkeypatch.setattr(loop, "optimizer_step", watched)
    return seen


@pytest.mark.parametrize("optimizer", quick(["AdamW", "AdamW8bit", "CustomAdamW"], "AdamW8bit"))
def test_the_run_follows_the_curve_and_its_file_says_so(
    optimizer: str, train: Any, tmp_path: Path, decays: Any
) -> None:
    words = ("--optimizer_type", optimizer, "--weight_decay", "0.5", *CURVE, "--wd_min_ratio", "auto")
    assert train(*words) == 0
    assert decays == pytest.approx([0.5, 0.5 * (1 - 0.8 / 3), 0.5 * (1 - 1.6 / 3), 0.1])
    assert metadata(tmp_path) == {
        "ss_dynamic_weight_decay": "True",
        "ss_wd_schedule": "linear",
        "ss_wd_transition_steps": "1",
        "ss_wd_min_ratio": "0.2",
        "ss_wd_max_progress": "3.0",
    }
    with safe_open(tmp_path / "out" / "test.safetensors", "pt") as file:
        assert "(weight_decay=0.5" in file.metadata()["ss_optimizer"]


def test_adaptive_sees_the_losses_of_the_run(train: Any, decays: Any) -> None:
    adaptive = ("--dynamic_weight_decay", "--wd_schedule", "adaptive", "--wd_transition_steps", "1")
    assert train(*adaptive, "--wd_flat", "window=3", "earliest=3", "slope=10", "gradient=1000") == 0
    assert decays == pytest.approx([0.01, 0.01, 0.01, 0.007])


def test_without_the_flag_the_file_says_nothing(train: Any, tmp_path: Path, decays: Any) -> None:
    assert train() == 0
    assert decays == [0.01] * 4
    assert metadata(tmp_path) == {}


def test_mistakes_end_before_training(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--optimizer_type", "LBFGS", "--dynamic_weight_decay") == 2
    assert "LBFGS has no weight_decay" in capsys.readouterr().err
    late = ("--dynamic_weight_decay", "--wd_schedule", "multi_stage", "--wd_stages", "0:1,90%:0.5,2:0.1")
    assert train(*late) == 2
    assert "wd_stages begin at steps 0, 3, 2; these must rise" in capsys.readouterr().err
