"""Optimizers that train other weights than they give out: whoever has `train()` and `eval()` is asked at each use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.run import build
from library.training import loop
from library.training.hooks.lr_schedule import LrSchedule
from library.training.hooks.saver import Saver
from library.training.hooks.validation import Validator
from tests.quick import quick, slow
from tests.training.written import weights

Train = Callable[..., int]

AVERAGING = {
    "AdamWScheduleFree": "1e-3",
    "pytorch_optimizer.ScheduleFreeAdamW": "1e-3",
    "pytorch_optimizer.SPlus": "1e-1",
    "prodigyplus.ProdigyPlusScheduleFree": "1",
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[loop.Run]:
    """The runs that are trained."""
    made: list[loop.Run] = []
    train = loop.train

    def spied(run: loop.Run) -> Any:
        made.append(run)
        return train(run)

    monkeypatch.setattr(loop, "train", spied)
    return made


def now(run: loop.Run) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in run.network.state_dict().items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference. Going from one kind of weights to the other and back rounds: 1e-7 of a weight."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).detach().abs().max()) for key in one)


@pytest.mark.parametrize("name", quick(AVERAGING, "AdamWScheduleFree"))
def test_files_hold_the_average(train: Train, tmp_path: Path, runs: list[loop.Run], name: str) -> None:
    rate = AVERAGING[name]
    assert train("--optimizer_type", name, "--learning_rate", rate, "--max_train_steps", "6") == 0
    (run,) = runs
    saved, optimizer = weights(tmp_path), run.optimizer.optimizer
    shown = now(run)
    optimizer.train()
    apart = distance(shown, now(run))
    assert distance(saved, shown) < 1e-3 * apart
    optimizer.eval()
    assert distance(saved, now(run)) < 1e-3 * apart


@pytest.mark.slow
def test_the_average_of_a_schedule_free_optimizer_is_the_papers(train: Train, tmp_path: Path, runs: list) -> None:
    """Defazio et al. 2024, equation 1: y = (1 - β) z + β x, so that x = (y - (1 - β) z) / β."""
    name = "pytorch_optimizer.ScheduleFreeAdamW"
    assert train("--optimizer_type", name, "--max_train_steps", "6") == 0
    (run,) = runs
    saved, optimizer = weights(tmp_path), run.optimizer.optimizer
    optimizer.train()
    z = {key: optimizer.state[parameter]["z"] for key, parameter in run.network.named_parameters()}
    trained, beta = now(run), 0.9
    assert len(z) > 100
    for key in z:
        average = (trained[key] - (1 - beta) * z[key]) / beta
        torch.testing.assert_close(saved[key], average, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", quick(AVERAGING, "AdamWScheduleFree"))
def test_whatever_looks_at_the_weights_sees_the_average(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Validation (before training, too), files, states, samples and the best one so far."""
    seen: list[tuple[str, bool]] = []

    def spy(kind: type, method: str) -> None:
        use = getattr(kind, method)

        def spied(self: Any, run: loop.Run, step: Any, **more: Any) -> Any:
            optimizer = run.optimizer.optimizer
            seen.append((method, bool(optimizer.state) and optimizer.param_groups[0]["train_mode"]))
            return use(self, run, step, **more)

        monkeypatch.setattr(kind, method, spied)

    spy(Validator, "validate")
    spy(Saver, "save")
    spy(Saver, "validated")
    words = ("--validation_split", "0.3", "--validate_every_n_steps", "1", "--save_every_n_steps", "2", "--save_state")
    assert train("--optimizer_type", name, "--learning_rate", AVERAGING[name], *words) == 0
    assert [what for what, _ in seen if what != "validated"] == ["validate", *["validate", "save"] * 4]
    assert "validated" in dict(seen)
    assert not any(training for _, training in seen)


@pytest.mark.slow
def test_two_averages_are_one_too_many(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    for name in AVERAGING:
        assert train("--optimizer_type", name, "--learning_rate", AVERAGING[name], "--ema_decay", "0.9") == 2
        assert f"--ema_decay: {name} averages the weights by itself" in capsys.readouterr().err
    plain = ("--optimizer_type", "prodigyplus.ProdigyPlusScheduleFree", "--optimizer_args", "use_schedulefree=False")
    assert train(*plain, "--learning_rate", "1", "--ema_decay", "0.9") == 0


def test_the_rate_finder_refuses_them(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pytorch_optimizer.ScheduleFreeAdamW", "pytorch_optimizer.SPlus"):
        assert train("--optimizer_type", name, "--find_lr") == 2
        assert "averages its weights over all steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "schedule"),
    [
        (("pytorch_optimizer.ScheduleFreeAdamW",), None),
        slow((("prodigyplus.ProdigyPlusScheduleFree",), None)),
        slow((("prodigyplus.ProdigyPlusScheduleFree", "--optimizer_args", "use_schedulefree=False"), "LambdaLR")),
        slow((("pytorch_optimizer.SPlus",), "LambdaLR")),
    ],
)
def test_only_a_schedule_free_one_goes_without_a_schedule(
    train: Train, runs: list[loop.Run], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], schedule: str | None
) -> None:
    assert train("--optimizer_type", *words, "--learning_rate", "1", "--lr_scheduler", "cosine") == 0
    found = runs[0].hook(LrSchedule)
    assert (None if found is None else type(found.schedule).__name__) == schedule
    assert ("needs no schedule" in capsys.readouterr().err) == (schedule is None)


def test_a_first_step_that_diverges_shows_no_average(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """SPlus has none before a step, and says so with a KeyError."""
    words = ("--optimizer_type", "pytorch_optimizer.SPlus", "--noise_offset", "1e30")
    assert train(*words) == 2
    assert "Nothing was trained yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("schedulefree.AdamWScheduleFreeClosure",), "its step() needs 'closure'"),
        (("Prodigy", "--learning_rate", "1", "--mixed_precision", "fp16", "--full_fp16"), "no weight moves"),
        (("DAdaptSGD", "--learning_rate", "1", "--mixed_precision", "fp16", "--full_fp16"), "ZeroDivisionError"),
        (("torch.optim.Muon",), "only supports 2D parameters"),
        (("pytorch_optimizer.SpectralSphere",), "only supports 2D parameters"),
    ],
)
def test_what_cannot_train_is_refused_before_the_model_is_read(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: Any, message: str
) -> None:
    monkeypatch.setattr(build, "build", lambda plan: pytest.fail("the model is loaded"))
    assert train("--optimizer_type", *words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
