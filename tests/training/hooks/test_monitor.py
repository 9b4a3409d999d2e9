"""What is measured while training is true, changes nothing, and goes on after a resume."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.config.parser import parse
from library.diffusion.ddpm import DDPM
from library.errors import UserError
from library.record.metrics import lines
from library.record.validation_history import Validation
from library.run import build
from library.training import loop
from library.training.hooks import monitor
from library.training.meter import BINS, Meter
from tests.conftest import BASE, ROOT
from tests.quick import slow
from tests.training.test_resume import stop_after

EVERY = ("--monitor_every_n_steps", "2")


def steps_of(folder: Path, name: str = "test") -> list[dict[str, Any]]:
    found = [line for line in lines(folder / "out" / f"{name}-metrics.jsonl") if "loss" in line]
    for line in found:
        del line["seconds"]
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each step really did, seen from outside: weights before and after, losses and timesteps of the samples."""
    steps: list[dict[str, Any]] = []
    one_step, one_batch = loop.optimizer_step, build.batch_loss

    def weights(run: loop.Run) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in run.parameters])

    def spied_step(run: loop.Run, item: loop.StepBatches) -> loop.Step:
        steps.append({"samples": [], "before": weights(run), "run": run})
        step = one_step(run, item)
        with torch.no_grad():
            norms = [float(adapter.delta().norm()) for adapter in run.network.adapters]
        steps[-1] |= {"after": weights(run), "loss": step.loss, "norms": norms}
        return step

    def spied_batch(*words: Any, **more: Any) -> Any:
        found = one_batch(*words, **more)
        steps[-1]["samples"] += zip(found.t.tolist(), found.per_sample.tolist(), strict=True)
        return found

    monkeypatch.setattr(loop, "optimizer_step", spied_step)
    monkeypatch.setattr(build, "batch_loss", spied_batch)
    return steps


@pytest.mark.parametrize(
    "words", [slow(((),)), ("--gradient_accumulation_steps", "2"), slow((("--max_grad_norm", "0"),))], ids=str
)
def test_what_is_told_is_what_happened(train, tmp_path, seen, words) -> None:
    assert train("--max_train_steps", "5", *EVERY, *words) == 0
    told = steps_of(tmp_path)
    assert [line["step"] for line in told] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in told if "update_ratio" in line] == [1, 2, 4, 5]
    pending: list[tuple[int, float]] = []
    for line, did in zip(told, seen, strict=True):
        assert line["loss"] == pytest.approx(did["loss"], rel=1e-6)
        assert line["loss"] == pytest.approx(sum(loss for _, loss in did["samples"]) / len(did["samples"]), rel=1e-5)
        assert line["weight_decay"] == {"all": 0.01}
        assert line["gradient_norm"] > 0
        pending += did["samples"]
        if "update_ratio" not in line:
            continue
        ratio = (did["after"] - did["before"]).norm() / did["after"].norm()
        assert line["update_ratio"] == pytest.approx(float(ratio), rel=1e-4)
        assert line["delta_norms"] == pytest.approx(did["norms"], rel=1e-3, abs=1e-6)
        for number, mean in enumerate(line["loss_by_timestep"]):
            losses = [loss for t, loss in pending if t * BINS // 1000 == number]
            assert mean == (pytest.approx(sum(losses) / len(losses), rel=1e-5) if losses else None)
        pending = []


def test_the_file_says_whose_norms_they_are(train, tmp_path) -> None:
    assert train("--max_train_steps", "1") == 0
    run, step, end = lines(tmp_path / "out" / "test-metrics.jsonl")
    assert end["end"]["stopped_by"] == ""
    assert len(run["run"]["adapters"]) == len(step["delta_norms"]) > 100
    assert run["run"]["adapters"][0].startswith("lora_unet_")
    assert run["run"]["timesteps"] == ["000-199", "200-399", "400-599", "600-799", "800-999"]


def test_the_weights_are_those_of_a_run_that_is_not_watched(train, tmp_path) -> None:
    words = ("--network_dropout", "0.1", "--optimizer_type", "CustomAdamW")
    assert train(*words, "--monitor_every_n_steps", "1") == 0
    assert train(*words, "--no-monitoring", "--output_name", "off") == 0
    on, off = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("test", "off"))
    assert all(torch.equal(on[key], off[key]) for key in on)
    assert not (tmp_path / "out" / "off-metrics.jsonl").exists()


def test_how_often_without_monitoring_is_a_contradiction() -> None:
    with pytest.raises(UserError, match="no effect with --no-monitoring"):
        parse([*("--pretrained_model_name_or_path", "x", "--output_dir", "y"), "--no-monitoring", *EVERY])


@pytest.mark.parametrize(
    ("words", "decays"),
    [
        (("--optimizer_type", "CustomAdamW", "--wd_transition_steps", "2", "--wd_decay_factor", "0.5"), "curve"),
        slow((("--dynamic_weight_decay", "--wd_transition_steps", "2", "--wd_decay_factor", "0.5"), "curve")),
        (("--optimizer_args", "weight_decay=0.1"), "constant"),
        slow((("--optimizer_type", "Rprop"), "none")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_the_weight_decay_in_effect(train, tmp_path, words, decays) -> None:
    assert train(*words, "--max_train_steps", "4") == 0
    found = [line["weight_decay"] for line in steps_of(tmp_path)]
    if decays == "none":
        assert found == [{}] * 4
        return
    expected = [0.01, 0.01, 0.01 * 0.5**0.5, 0.01 * 0.5] if decays == "curve" else [0.1] * 4
    assert [decay["all"] for decay in found] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "factors"),
    [
        slow((("--lr_scheduler", "linear", "--lr_warmup_steps", "2"), [0.0, 0.5, 1.0, 0.5])),
        # ends at 1e-7, whatever --learning_rate is, which neither part has
        (
            ("--lr_scheduler", "polynomial", "--unet_lr", "1e-3", "--text_encoder_lr", "1e-3", "--learning_rate", "0"),
            [1.0, 0.75, 0.5, 0.25],
        ),
        slow((("--optimizer_type", "Adafactor", "--optimizer_args", "scale_parameter=False"), [10.0] * 4)),
    ],
    ids=lambda value: value[1],
)
def test_the_rate_in_effect_is_that_of_the_step(train, tmp_path, words, factors) -> None:
    assert train(*words, "--max_train_steps", "4") == 0
    found = [line["rates"] for line in steps_of(tmp_path)]
    assert [rates["unet"] for rates in found] == pytest.approx([1e-3 * factor for factor in factors], rel=2e-3)
    assert all(rates["text_encoder"] == rates["unet"] for rates in found)


def test_a_resumed_run_tells_what_an_unbroken_one_does(train, tmp_path, monkeypatch) -> None:
    words = ("--max_train_steps", "7", "--monitor_every_n_steps", "3", "--lr_scheduler", "cosine")
    assert train(*words, "--output_name", "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert train(*words, "--save_every_n_steps", "3", "--save_state") == 130
    state = str(tmp_path / "out" / "test-step00000003-state")
    assert train(*words, "--resume", state) == 0
    whole, resumed = steps_of(tmp_path, "whole"), steps_of(tmp_path)
    assert resumed == whole


@pytest.mark.slow
def test_a_file_that_is_there_stops_the_run_but_not_its_own(train, tmp_path, capsys) -> None:
    file = tmp_path / "out" / "test-metrics.jsonl"
    file.parent.mkdir()
    file.write_text("mine")
    assert train() == 2
    assert "test-metrics.jsonl" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert train("--no-monitoring", "--save_every_n_steps", "2", "--save_state") == 0
    state = str(tmp_path / "out" / "test-step00000002-state")
    assert train("--resume", state) == 2  # another's file, also where a run goes on
    assert train("--resume", state, "--overwrite") == 0
    assert [line["step"] for line in steps_of(tmp_path)] == [3, 4]


def test_what_a_run_left_that_saved_nothing_is_replaced(train, tmp_path, capsys) -> None:
    """Killed before its first save, or diverged in its first step: the same command works again."""
    path = tmp_path / "out" / "test-metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"run":{"session_id":7}}\n{"step":1,"loss":0.5}\n')
    path.with_name("test-report.html").write_text('<meta name="session" content="7">')
    words = ("--report", "--max_train_steps", "1", "--network_dim", "1")
    for saved in ("test-best.safetensors", "test-000002.ckpt"):
        path.with_name(saved).touch()
        assert train(*words) == 2
        assert "the run would replace" in capsys.readouterr().err
        path.with_name(saved).unlink()
    path.with_name("test-step00000002-state").mkdir()
    assert train(*words) == 2
    path.with_name("test-step00000002-state").rmdir()
    path.with_name("test-big.safetensors").touch()  # another run's
    assert train(*words) == 0
    assert (
        f"replacing {path}, {path.with_name('test-report.html')}, of a run that saved nothing"
        in capsys.readouterr().err
    )
    assert '"session_id":7,' not in path.read_text()


@pytest.mark.slow
def test_a_dry_run_says_where_the_file_will_be_and_writes_none(train, tmp_path, capsys) -> None:
    assert train("--dry_run", "--report") == 0
    said = " ".join(capsys.readouterr().out.split())
    for what, name in (
        ("how the run stands", "test-run.json"),
        ("what each step does", "test-metrics.jsonl"),
        ("the whole run on one page", "test-report.html"),
    ):
        assert f"{what}: {tmp_path / 'out' / name}" in said
    assert not (tmp_path / "out").exists()


def test_trackers_show_it_too(train, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train("--logging_dir", str(tmp_path / "logs"), *EVERY) == 0
    (file,) = (tmp_path / "logs").rglob("events*")
    events = EventAccumulator(str(file)).Reload()
    told = steps_of(tmp_path)
    for tag, key in (
        ("loss/current", "loss"),
        ("norm/gradient", "gradient_norm"),
        ("norm/update_ratio", "update_ratio"),
    ):
        values = [(event.step, event.value) for event in events.Scalars(tag)]
        assert values == [(line["step"], pytest.approx(line[key], rel=1e-5)) for line in told if key in line]
    (first, *_), norms = events.Scalars("norm/avg_key_norm"), told[0]["delta_norms"]
    assert first.value == pytest.approx(sum(norms) / len(norms), rel=1e-3, abs=1e-6)
    assert {"lr/unet", "weight_decay/all", "norm/max_key_norm", "norm/weights"} <= set(events.Tags()["scalars"])
    assert any(tag.startswith("loss/timestep_") for tag in events.Tags()["scalars"])


def test_a_foreign_network_has_no_delta_norms(train, tmp_path) -> None:
    words = ("--network_module", "lycoris.kohya", "--network_args", "algo=loha", "preset=attn-mlp")
    assert train(*words, "--max_train_steps", "2") == 0
    assert [line["delta_norms"] for line in steps_of(tmp_path)] == [[], []]


def test_warnings_are_said_written_and_not_said_again(train, tmp_path, monkeypatch, capsys) -> None:
    """A learning rate that does nothing, with rules that need two measurements instead of ten."""
    monkeypatch.setattr("library.training.warning_signs.MEASUREMENTS", 2)
    words = ("--monitor_every_n_steps", "1", "--learning_rate", "1e-9", "--save_every_n_steps", "3", "--save_state")
    for more in ((), ("--resume", str(tmp_path / "out" / "test-step00000003-state"))):
        assert train(*words, *more) == 0
        said = capsys.readouterr().err
        assert said.count("changes almost nothing") == said.count("warning: step 2: ") == (0 if more else 1)
        warnings = [line for line in lines(tmp_path / "out" / "test-metrics.jsonl") if "warning" in line]
        assert [(line["step"], line["warning"]["sign"]) for line in warnings] == [(2, "flat updates")]


@pytest.mark.slow
def test_weights_that_stand_still_are_seen(train, tmp_path, capsys) -> None:
    """The step that SGD makes here is less than half the smallest number of fp16; with thirty times larger gradients it
    would not be, so that it is not refused."""
    half = ("--mixed_precision", "fp16", "--full_fp16", "--optimizer_type", "SGD", "--learning_rate", "2e-5")
    assert train(*half, "--monitor_every_n_steps", "5", "--max_train_steps", "15") == 0
    assert capsys.readouterr().err.count("with gradients of the usual size no weight moves") == 1
    told = list(lines(tmp_path / "out" / "test-metrics.jsonl"))
    moved = [line["moved"] for line in told if "moved" in line]
    assert len(moved) == 4
    assert all(share < 1e-3 for step in moved[1:] for share in step.values())  # but for the largest gradients
    (warning,) = (line for line in told if "warning" in line)
    assert (warning["step"], warning["warning"]["sign"]) == (15, "weights stand still")
    assert "no weight of text_encoder and unet" in warning["warning"]["text"]


def test_what_moved_is_counted_by_group() -> None:
    from accelerate import Accelerator

    first, second, text = (torch.nn.Parameter(torch.ones(size)) for size in (12, 12, 5))
    groups = {"unet": [first, second], "text": [text]}
    unknown: Any = SimpleNamespace(norms=lambda: None)  # a network that does not tell them
    meter = Meter(groups, unknown, Accelerator(cpu=True), process=DDPM("epsilon", torch.linspace(0.9, 0.1, 1000)))
    meter.before()
    with torch.no_grad():
        second[:3] += 1
        first[0] += 1e-9  # is lost
        text[2:] = math.nan
    assert meter.after().moved == {"unet": 3 / 24, "text": 3 / 5}


def test_validation_losses_are_written_and_judged(train, tmp_path, monkeypatch) -> None:
    runs = []
    one_run = loop.train
    monkeypatch.setattr(loop, "train", lambda run: (runs.append(run), one_run(run))[1])
    assert train("--max_train_steps", "2") == 0
    (run,) = runs
    watching = run.hook(monitor.Monitor)
    watching._file = monitor.metrics.MetricsFile(tmp_path / "out" / "more-metrics.jsonl", {"session_id": 1}, done=0)
    watching.validated(run, Validation(2, 0.2, {500: 0.25}), best=True)
    watching.validated(run, Validation(2, math.nan, {500: 0.25}), best=False)
    watching._file.close()
    assert [line for line in lines(tmp_path / "out" / "more-metrics.jsonl") if "step" in line] == [
        {"step": 2, "validation": {"loss": 0.2, "t500": 0.25}},
        {"step": 2, "validation": {"loss": None, "t500": 0.25}},
    ]


@pytest.mark.slow
def test_several_processes_tell_of_all_samples(train, tmp_path, image_folder) -> None:
    """Two processes with one image each see what one process with two of them sees."""
    words = [
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(image_folder), "--resolution", "64"),
        *("--caption_extension", ".txt", "--output_dir", str(tmp_path / "out"), "--output_name", "two"),
        *("--network_dim", "4", "--network_alpha", "2", "--learning_rate", "1e-3", "--max_train_steps", "3"),
        *("--seed", "1", "--no-loss_plot", "--cache_latents", "--max_data_loader_n_workers", "0", *EVERY),
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launcher, "train_network.py", *words]
    two = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert two.returncode == 0, two.stderr
    alone = ("--train_batch_size", "1", "--gradient_accumulation_steps", "2", "--max_train_steps", "3")
    assert train(*alone, "--output_name", "one", *EVERY) == 0
    for ours, theirs in zip(steps_of(tmp_path, "one"), steps_of(tmp_path, "two"), strict=True):
        assert ours.keys() == theirs.keys()
        for key in {"loss", "gradient_norm", "update_ratio"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3)
        for mine, yours in zip(ours.get("loss_by_timestep", ()), theirs.get("loss_by_timestep", ()), strict=True):
            assert mine is yours is None or mine == pytest.approx(yours, rel=1e-3)
