"""Hooks of a run: when their moments come, and what becomes of their state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from library.data.dataset import Batch
from library.record.validation_history import Validation
from library.run import build
from library.training import loop, state
from library.training.divergence import Diverged
from library.training.hook import Hook, Step
from library.training.run import Position, Run
from library.training.step import BatchLoss
from tests.training.test_resume import flat, stop_after
from tests.training.written import same, weights

Train = Callable[..., int]


class Tally(Hook[Run]):
    """Counts the images trained over all sessions of a run, and notes its moments."""

    name = "tally"

    def __init__(self, adopts: bool = False) -> None:
        self.images, self.moments, self._adopts = 0, list[str](), adopts

    def before_training(self, run: Run) -> None:
        self.moments.append(f"before training at {run.position.done}")

    def resumed(self, run: Run) -> None:
        self.moments.append(f"resumed at {run.position.done} with {self.images}")

    def start_epoch(self, run: Run, epoch: int) -> None:
        self.moments.append(f"epoch {epoch}")

    def before_batch(self, run: Run, batch: Batch) -> None:
        self.moments.append("batch")

    def after_batch(self, run: Run, batch: Batch, found: BatchLoss) -> None:
        self.images += len(found.per_sample)
        self.moments.append("loss")

    def after_backward(self, run: Run, step: Step) -> None:
        assert any(parameter.grad is not None for parameter in run.parameters)
        self.moments.append(f"backward {step.number}")

    def before_step(self, run: Run, step: Step) -> None:
        assert step.gradient_norm is not None
        assert step.loss > 0
        self.moments.append(f"before step {step.number}")

    def after_step(self, run: Run, step: Step) -> None:
        assert all(parameter.grad is None for parameter in run.parameters)
        self.moments.append(f"after step {step.number}")

    def report(self, run: Run, step: Step) -> Mapping[str, float]:
        self.moments.append(f"report {step.number}")
        return {"images": self.images}

    def end_of_step(self, run: Run, step: Step) -> bool:
        self.moments.append(f"end of step {step.number}")
        return False

    def validated(self, run: Run, result: Validation, *, best: bool) -> None:
        self.moments.append(f"validated {result.step}{', best' * best}")

    def save(self, run: Run, step: int, *, last: bool) -> None:
        self.moments.append(f"save {step}{', last' * last}")

    def save_now(self, run: Run, step: int) -> None:
        self.moments.append(f"save now {step}")

    def weights_for(self, run: Run, purpose: str) -> AbstractContextManager[None]:
        self.moments.append(f"weights to {purpose}")
        return nullcontext()

    def diverged(self, run: Run, step: int, why: str) -> None:
        self.moments.append(f"diverged {step}")

    def rolled_back(self, run: Run, step: int, why: str) -> None:
        self.moments.append(f"back to {step} with {self.images}")

    def end(self, run: Run, *, stopped_by: str, conclusion: str) -> None:
        self.moments.append(f"end{f' by {stopped_by}' if stopped_by else ''}")

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.images = state["images"]

    def adopt(self, state: Mapping[str, Any] | None, *, step: int) -> bool:
        self.moments.append(f"adopt at {step}")
        return self._adopts


@pytest.fixture
def tally(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tally]:
    """Adds a new one to the hooks of all runs from now on."""
    make = build.make_hooks

    def add(**settings: Any) -> Tally:
        hook = Tally(**settings)
        monkeypatch.setattr(build, "make_hooks", lambda *given: (*make(*given), hook))
        return hook

    return add


def test_the_moments_of_a_run(train: Train, tally: Callable[..., Tally], tmp_path: Path) -> None:
    hook = tally()
    words = ("--max_train_steps", "4", "--gradient_accumulation_steps", "2")
    assert train(*words) == 0
    batches = "batch loss batch loss backward {0} before step {0} after step {0} report {0} end of step {0}"
    # an epoch of 12 draws has six batches, and so three steps; only the last is saved
    saved = ("weights to save save {0}" if step == 4 else "save {0}" for step in range(1, 5))
    steps = [f"{batches} {save}".format(step) for step, save in enumerate(saved, 1)]
    expected = ["before training at 0 epoch 0", *steps[:3], "epoch 1", steps[3], "end"]
    assert " ".join(hook.moments) == " ".join(expected)
    assert hook.images == 16


def test_validation_ends_a_run(train: Train, tally: Callable[..., Tally], monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([2.0, 1.0, 1.5])
    monkeypatch.setattr("library.training.hooks.validation.measure", lambda *_: {500: next(losses)})
    hook = tally()
    words = ("--validation_split", "0.3", "--validate_every_n_steps", "1", "--early_stopping_patience", "1")
    assert train(*words) == 0
    told = [moment for moment in hook.moments if moment.startswith(("before training", "validated", "save", "end "))]
    assert told == [
        # the hook's place is the last: it is told of the first validation before its own moment
        *("validated 0", "before training at 0"),
        *("validated 1, best", "end of step 1", "save 1", "validated 2", "end of step 2", "save 2, last"),
    ]


def test_a_hooks_state_survives_a_resume(
    train: Train, tally: Callable[..., Tally], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tally()
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train("--save_state") == 130
    assert first.images == 4
    assert "save now 2" in first.moments
    assert first.moments[-1] == "end by SIGINT"
    kept = torch.load(tmp_path / "out" / "test-step00000002-state" / state.TENSORS, weights_only=True)
    assert kept["hooks"]["tally"] == {"images": 4}
    second = tally()
    assert train("--resume", "latest") == 0
    assert second.moments[:2] == ["resumed at 2 with 4", "before training at 2"]
    assert second.images == 8


@pytest.mark.slow
def test_other_settings_may_be_adopted(
    train: Train, tally: Callable[..., Tally], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tally()
    assert train("--save_state_on_train_end", "--max_train_steps", "2") == 0
    anyway = ("--resume", "latest", "--resume_anyway", "--learning_rate", "5e-4", "--max_train_steps", "3")
    for adopts, images in ((False, 4), (True, 0)):
        hook = tally(adopts=adopts)
        assert train(*anyway, "--overwrite") == 0
        assert hook.moments[:2] == ["adopt at 2", f"resumed at 2 with {images}"]


@pytest.mark.slow
def test_a_state_with_a_hook_that_the_run_lacks(
    train: Train, tally: Callable[..., Tally], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        make = build.make_hooks
        patch.setattr(build, "make_hooks", lambda *given: (*make(*given), Tally()))
        assert train("--save_state_on_train_end", "--max_train_steps", "2") == 0
    capsys.readouterr()
    assert train("--resume", "latest", "--max_train_steps", "3", "--save_state_on_train_end") == 0
    assert "--resume: the run has no tally, the state has one" in capsys.readouterr().err
    tally()
    assert train("--resume", "latest", "--max_train_steps", "4") == 0
    assert "--resume: the state has no tally, the run has one" in capsys.readouterr().err


def test_a_rollback_puts_hooks_back(train: Train, tally: Callable[..., Tally], monkeypatch: pytest.MonkeyPatch) -> None:
    hook, real, calls = tally(), build.batch_loss, Counter[str]()

    def broken(*arguments: Any, **settings: Any) -> BatchLoss:
        calls["batch"] += 1
        found = real(*arguments, **settings)
        return found._replace(loss=found.loss * torch.nan) if calls["batch"] == 4 else found

    monkeypatch.setattr(build, "batch_loss", broken)
    assert train("--on_divergence", "rollback", "--save_every_n_steps", "2") == 0
    # 8 images had been seen: the guard remembers step 2, before the hooks behind it are told to save
    assert [moment for moment in hook.moments if "back" in moment and "backward" not in moment] == ["back to 2 with 4"]
    assert hook.images == 8


def test_a_skipped_step_is_reported(train: Train, tally: Callable[..., Tally], monkeypatch: pytest.MonkeyPatch) -> None:
    hook, real = tally(), loop.optimizer_step

    def broken(run: Run, item: loop.StepBatches) -> Step:
        if item.step == 2:
            raise Diverged(2, "the loss is NaN")
        return real(run, item)

    monkeypatch.setattr(loop, "optimizer_step", broken)
    assert train("--on_divergence", "skip") == 0
    where = hook.moments.index("diverged 2")
    assert hook.moments[where : where + 4] == ["diverged 2", "report 2", "end of step 2", "save 2"]


def test_no_two_hooks_have_one_name(train: Train, tally: Callable[..., Tally]) -> None:
    hook = tally()
    runs: list[Run] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", lambda run: runs.append(run))
        assert train() == 0
    (run,) = runs
    assert run.hook(Tally) is hook
    with pytest.raises(ValueError, match="tally"):
        replace(run, hooks=(*run.hooks, Tally()))
    with pytest.raises(ValueError, match="hooks need unique names"):
        replace(run, hooks=(Hook(),))
    with pytest.raises(AttributeError):
        run.position = Position(total=1)  # type: ignore[misc]


# -- states of format 1, whose hooks had places of their own beside the network

OLD_PLACES = {"schedule": "schedule", "validation": "validation", "average": "average", "monitor": "meter"}


def to_format_1(folder: Path, *, divergences: int | None) -> None:
    """Write a state as the version before hooks did."""
    facts = folder / state.FACTS
    text = facts.read_text()
    assert '"format": 2' in text
    facts.write_text(text.replace('"format": 2', '"format": 1'))
    tensors = torch.load(folder / state.TENSORS, weights_only=True)
    hooks = tensors.pop("hooks")
    old = {place: hooks.pop(name, None) for name, place in OLD_PLACES.items()}
    assert hooks.pop("divergences") == {"count": 0}
    assert hooks == {}
    old |= {} if divergences is None else {"divergences": divergences}
    torch.save({**tensors, **old}, folder / state.TENSORS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--lr_scheduler", "cosine", "--ema_decay", "0.9", "--validation_split", "0.3", "--network_dropout", "0.1"),
        ("--optimizer_type", "CustomAdamW", "--wd_schedule", "adaptive", "--wd_flat", "window=4", "earliest=4"),
        ("--optimizer_type", "AdamWScheduleFree", "--no-monitoring"),
    ],
    ids=lambda words: " ".join(words),
)
def test_a_state_of_format_1_goes_on_with_the_same_bits(
    words: tuple[str, ...], train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*words, "--save_state", "--save_every_n_steps", "2", "--max_train_steps", "6")
    assert train(*words) == 0
    whole = weights(tmp_path)
    last = torch.load(tmp_path / "out" / "test-state" / state.TENSORS, weights_only=True)
    folder = tmp_path / "out" / "test-step00000002-state"
    to_format_1(folder, divergences=None)  # as the first states of all
    capsys.readouterr()
    assert train(*words, "--resume", str(folder), "--overwrite") == 0
    assert "has no" not in capsys.readouterr().err
    assert same(weights(tmp_path), whole)
    again = torch.load(tmp_path / "out" / "test-state" / state.TENSORS, weights_only=True)
    assert flat(again) == flat(last)


@pytest.mark.slow
def test_a_state_of_format_1_counts_its_divergences(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "out", ("--save_state_on_train_end", "--max_train_steps", "2")
    assert train(*words) == 0
    to_format_1(out / "test-state", divergences=3)
    assert train("--resume", "latest", "--max_train_steps", "3", "--save_state_on_train_end") == 0
    kept = torch.load(out / "test-state" / state.TENSORS, weights_only=True)
    assert kept["hooks"]["divergences"] == {"count": 3}
    kept["hooks"]["divergences"] = {"count": -1}
    torch.save(kept, out / "test-state" / state.TENSORS)
    assert train("--resume", "latest", "--max_train_steps", "4") == 2
    assert "its divergences does not fit this run's: its count is '-1'" in capsys.readouterr().err
