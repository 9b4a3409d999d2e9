"""A loss or gradient that is no number: what is said, what is kept, and how the run goes on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.record import metrics
from library.run import build
from library.training import divergence, loop, state
from library.training.gradients import WholeGradients
from library.training.hooks import guard
from library.training.hooks.lr_schedule import LrSchedule
from library.training.step import BatchLoss
from tests.quick import quick, slow
from tests.training.written import weights

Train = Callable[..., int]


def break_at(monkeypatch: pytest.MonkeyPatch, *calls: int, of: str = "loss") -> None:
    """The batches of these numbers, counted from 1 as they come, give NaN as their loss, or as their gradient."""
    real, count = build.batch_loss, 0

    def broken(*arguments: Any, **settings: Any) -> BatchLoss:
        nonlocal count
        count += 1
        found = real(*arguments, **settings)
        if count not in calls:
            return found
        if of == "gradient":
            found.loss.register_hook(lambda gradient: gradient * math.nan)
            return found
        wrong = math.inf if of == "infinity" else math.nan
        return found._replace(loss=found.loss * wrong, per_sample=found.per_sample * wrong)

    monkeypatch.setattr(build, "batch_loss", broken)


def final_state(tmp_path: Path) -> dict[str, Any]:
    return torch.load(tmp_path / "out" / "test-state" / state.TENSORS, weights_only=True)


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ("loss", "step 3: the loss is NaN, of "),
        slow(("infinity", "step 3: the loss is infinite, of ")),
        slow(("gradient", "step 3: the gradient is not finite, of ")),
    ],
)
@pytest.mark.parametrize("clip", quick(["1", "0"], "1"))
def test_stop_names_the_images_and_saves_what_was_good(
    of: str, said: str, clip: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    break_at(monkeypatch, 3, of=of)
    assert train("--max_grad_norm", clip) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(tmp_path / "data" / "2_style") in error.split(said)[1]
    assert "The run is saved as of step 2" in error
    out = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert out == ["test-metrics.jsonl", "test-run.json", "test-step00000002-state", "test-step00000002.safetensors"]
    monkeypatch.undo()
    assert train("--resume", "latest", "--save_state_on_train_end", "--max_grad_norm", clip) == 0  # the state is whole
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_a_rate_that_is_far_too_high(train: Train, tmp_path: Path, capsys: Any) -> None:
    """Not provoked: the weights themselves go wrong. The file of before is still there."""
    assert train("--save_every_n_steps", "1") == 0
    before = (tmp_path / "out" / "test.safetensors").read_bytes()
    assert train("--learning_rate", "1e38", "--optimizer_type", "SGD", "--overwrite", "--max_train_steps", "20") == 2
    error = capsys.readouterr().err
    assert "a lower --learning_rate is the usual cure" in error  # found in the trial already
    assert (tmp_path / "out" / "test.safetensors").read_bytes() == before


def test_skip_leaves_the_step_out(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with monkeypatch.context() as patch:
        break_at(patch, 2)
        assert train("--on_divergence", "skip", "--save_state_on_train_end", "--lr_scheduler", "cosine") == 0
    said = capsys.readouterr().err
    assert "The step is skipped (1 of at most 10" in said
    kept = final_state(tmp_path)
    assert [math.isnan(loss) for loss in kept["losses"]] == [False, True, False, False]
    told = [line for line in metrics.lines(tmp_path / "out" / "test-metrics.jsonl") if "step" in line]
    assert [(line["step"], line.get("loss") is None, "warning" in line) for line in told if "end" not in line] == [
        *((1, False, False), (2, True, True), (2, True, False), (3, False, False), (4, False, False)),
    ]
    assert all(None not in line["delta_norms"] for line in told if "delta_norms" in line)
    assert kept["hooks"]["schedule"]["last_epoch"] == 3
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.slow
def test_the_limit_counts_over_a_resume(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ("--on_divergence", "skip", "--divergence_limit", "2")
    with monkeypatch.context() as patch:
        break_at(patch, 1, 2, 4)
        assert train(*words, "--max_train_steps", "6") == 2
    assert "once more than --divergence_limit 2 allows" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        break_at(patch, 2)
        assert train(*words, "--max_train_steps", "6", "--resume", "latest") == 2
    assert "step 5: the loss is NaN" in capsys.readouterr().err


@pytest.mark.slow
def test_rollback_goes_back_with_lower_rates(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Twice to the same place, then on: a quarter of the rates, and the same files at the same steps."""
    steps = []
    one_step = loop.optimizer_step
    monkeypatch.setattr(loop, "optimizer_step", lambda run, item: (steps.append(item.step), one_step(run, item))[1])
    with monkeypatch.context() as patch:
        break_at(patch, 4, 6)
        words = ("--on_divergence", "rollback", "--lr_scheduler", "linear", "--max_train_steps", "6")
        assert train(*words, "--save_every_n_steps", "2", "--save_state_on_train_end") == 0
    assert steps == [1, 2, 3, 4, 3, 4, 3, 4, 5, 6]
    said = capsys.readouterr().err
    assert "Rolled back to step 2, with its learning rates times 0.5 (1 of at most 10" in said
    assert "Rolled back to step 2, with its learning rates times 0.25 (2 of at most 10" in said
    kept = final_state(tmp_path)
    assert kept["hooks"]["schedule"]["base_lrs"] == pytest.approx(
        [0.00025] * len(kept["hooks"]["schedule"]["base_lrs"])
    )
    assert kept["hooks"]["divergences"] == {"count": 2}
    assert len(kept["losses"]) == 6
    told = [line for line in metrics.lines(tmp_path / "out" / "test-metrics.jsonl") if "step" in line]
    assert [(line["step"], line["warning"]["text"][:7]) for line in told if "warning" in line] == [(2, "step 4:")] * 2
    assert [line["step"] for line in told if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "out" / "test-step00000004.safetensors").exists()


@pytest.mark.slow
def test_rollback_puts_every_bit_back(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rates that are not lowered the result is that of a run that never diverged."""
    words = ("--on_divergence", "rollback", "--max_train_steps", "6", "--shuffle_caption", "--network_dropout", "0.1")
    assert train(*words, "--output_name", "smooth") == 0
    monkeypatch.setattr(guard, "LOWER", 1.0)
    break_at(monkeypatch, 2, 5)
    assert train(*words) == 0
    smooth, rough = weights(tmp_path, "smooth"), weights(tmp_path)
    assert all(torch.equal(smooth[key], rough[key]) for key in smooth)


def test_fp16_steps_that_the_scaler_leaves_out_are_no_divergence(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A scaler on the CPU stands in for that of CUDA: its gradients overflow until the scale has come down."""
    from accelerate import Accelerator

    prepare = Accelerator.prepare_optimizer
    scales: list[float] = []

    def with_scaler(self: Accelerator, optimizer: Any, **settings: Any) -> Any:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-12)
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            parameter.register_hook(lambda gradient: gradient.half().float())
        wrapped = prepare(self, optimizer, **settings)
        wrapped.scaler = self.scaler
        return wrapped

    @contextlib.contextmanager
    def noted() -> Iterator[None]:
        one_step = loop.optimizer_step

        def step(run: loop.Run, item: loop.StepBatches) -> loop.Step:
            scales.append(run.accelerator.scaler.get_scale())
            return one_step(run, item)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "optimizer_step", step)
            patch.setattr(Accelerator, "prepare_optimizer", with_scaler)
            patch.setattr(
                Accelerator, "unscale_gradients", lambda self, optimizer: self.scaler.unscale_(optimizer.optimizer)
            )
            yield

    with noted():
        assert train("--max_grad_norm", "0") == 0
    assert scales[0] == 2.0**40
    assert scales[-1] < scales[0]
    with noted():
        break_at(monkeypatch, 2)
        assert train("--max_grad_norm", "0", "--overwrite") == 2  # the loss itself is told apart
    assert "the loss is NaN" in capsys.readouterr().err
    with noted():
        break_at(monkeypatch, 2)
        assert train("--max_grad_norm", "0", "--overwrite", "--on_divergence", "skip") == 0
    assert "The step is skipped" in capsys.readouterr().err


def test_a_process_without_a_batch_in_its_first_step_unscales_the_mean() -> None:
    """As one that resumes before the last, short step of an epoch."""
    weight, scaler = torch.nn.Parameter(torch.zeros(1)), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD([weight])
    unscale = scaler.unscale_
    accelerator = SimpleNamespace(scaler=scaler, device=torch.device("cpu"), unscale_gradients=unscale)
    gradients = WholeGradients(accelerator, optimizer, [weight], max_norm=0)  # type: ignore[arg-type]
    weight.grad = torch.tensor([16.0])
    assert gradients.clip() == 2


def test_many_images_are_listed_in_part() -> None:
    problem = divergence.named(7, [0.1, math.nan], [["a.png"], [f"{i}.png" for i in range(10)]])
    assert str(problem).startswith("step 7: the loss is NaN in batch 2 of 2, of 0.png, 1.png")
    assert str(problem).endswith("7.png and 2 more")


@pytest.mark.slow
def test_a_full_disk_costs_a_message_and_not_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The file of step 2 finds no room; those of steps 4 and 6 are written."""
    from library.record import saves as save

    real = save.os.replace

    def full_once(source: Any, target: Any) -> None:
        if str(target).endswith("00000002.safetensors"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(save.os, "replace", full_once)
    assert train("--max_train_steps", "6", "--save_every_n_steps", "2", "--save_state", "--save_last_n_steps", "2") == 0
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert "Training continues" in said
    assert "1 times a file or state could not be written" in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("test-step00000004.safetensors", "test-step00000004-state", "test-step00000006.safetensors"),
        *("test-step00000006-state", "test.safetensors", "test-state", "test-metrics.jsonl", "test-run.json"),
    }


def test_rates_that_a_schedule_keeps_in_the_groups_are_lowered_too() -> None:
    weight = torch.nn.Parameter(torch.ones(1))

    def rates(factor: float) -> list[float]:
        optimizer = torch.optim.SGD([weight], lr=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=9)
        hook = LrSchedule(schedule, None)  # type: ignore[arg-type]
        guard.lower_rates(SimpleNamespace(optimizer=optimizer, hook=lambda kind: hook), factor)  # type: ignore[arg-type]
        found = []
        for _ in range(8):
            optimizer.step()
            schedule.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    assert rates(0.25) == pytest.approx([rate / 4 for rate in rates(1.0)])
