"""What a run's record says of it, through the real command line."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from library.config.parser import parse
from library.config.settings import without_secrets
from library.errors import UserError
from library.files.typed_json import from_json, to_json
from library.record.facts import Facts
from library.record.metrics import read_run
from library.record.run_file import Record, read
from library.record.summary import rows
from library.run.about import recording
from library.run.build import build
from library.run.plan import make_plan
from library.training import loop
from tests.conftest import BASE, copy_images
from tests.quick import slow
from tests.training.test_resume import stop_after

NEEDED = ("--pretrained_model_name_or_path", "x", "--output_dir", "y")


def record_of(folder: Path, name: str = "test") -> Record:
    found = read(folder / "out" / f"{name}-run.json")
    assert found is not None
    return found


@pytest.mark.slow
def test_what_a_run_says_of_itself(train, tmp_path):
    words = ("--save_every_n_steps", "2", "--save_state_on_train_end", "--lr_scheduler", "cosine")
    assert train(*words, "--validation_split", "0.3") == 0
    found = record_of(tmp_path)
    session = found.session
    assert (found.name, found.steps_total, session.steps_done) == ("test", 4, 4)
    assert (session.status, session.reason, session.pid, session.first_step) == ("finished", "", os.getpid(), 0)
    assert session.started < session.heartbeat
    assert session.command[-2:] == ["--validation_split", "0.3"]
    assert found.id == read_run(tmp_path / "out" / "test-metrics.jsonl")["session_id"]
    assert {(item.name, item.kind, item.step) for item in found.files if "best" not in item.name} == {
        ("test-step00000002.safetensors", "network", 2),
        ("test-step00000004.safetensors", "network", 4),
        ("test.safetensors", "network", 4),
        ("test-state", "state", 4),
    }
    for item in found.files:
        path = tmp_path / "out" / item.name
        assert item.bytes == (path.stat().st_size if path.is_file() else None)
    assert found.settings.given["lr_scheduler"].value == "cosine"
    assert found.settings.given["lr_scheduler"].place == "command line: --lr_scheduler"
    assert "max_grad_norm" not in found.settings.given
    assert (found.settings.in_effect["max_grad_norm"], found.settings.in_effect["seed"]) == (1.0, 1)
    facts = found.facts
    assert facts is not None
    assert (facts.model.version, facts.model.precision, facts.model.device) == ("sd_v1", "fp32", "cpu")
    assert facts.network.ranks == (4, 4)
    assert [(item.part, item.count) for item in facts.network.adapters] == [("text_encoder", 18), ("unet", 120)]
    assert sum(item.parameters for item in facts.network.adapters) == facts.network.parameters == 139_776
    assert facts.validation is not None
    assert facts.images[0].held_out == facts.validation.images == 2
    assert facts.captions.different == 4
    assert (facts.length.steps, facts.rates.schedule, facts.rates.groups[0].rate) == (4, "cosine", 1e-3)
    assert facts.decay is not None
    assert facts.decay.base == 0.01


def test_without_a_record_a_run_has_no_thread_that_writes_one(tmp_path: Path) -> None:
    """A program that builds many runs would have one for each."""
    copy_images(tmp_path / "data" / "2_style", 2)
    given = [
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(tmp_path / "data")),
        *("--caption_extension", ".txt", "--resolution", "64", "--output_dir", str(tmp_path / "out")),
        *("--max_train_steps", "2", "--max_data_loader_n_workers", "0"),
    ]
    build(make_plan(parse(given)))
    assert "run record" not in [thread.name for thread in threading.enumerate()]
    assert not list((tmp_path / "out").glob("*-run.json"))


@pytest.mark.parametrize(
    "words",
    [
        slow(((),)),
        ("--optimizer_type", "CustomAdamW", "--wd_schedule", "multi_stage", "--wd_stages", "0:1,50%:0.5"),
        slow(
            (
                (
                    *("--optimizer_type", "Prodigy", "--network_train_unet_only"),
                    *("--shuffle_caption", "--caption_dropout_rate", "0.1"),
                ),
            )
        ),
        ("--lr_layer_decay", "0.9", "--lr_warmup_steps", "1", "--lr_scheduler", "linear", "--validation_split", "0.3"),
    ],
    ids=["plain", "a curve", "own rates", "many groups"],
)
def test_the_lines_of_the_console_are_the_facts(train, tmp_path, capsys, words):
    """Written, read again, and in words: nothing is lost on the way."""
    assert train("--max_train_steps", "2", *words) == 0
    facts = record_of(tmp_path).facts
    assert facts is not None
    assert from_json(Facts, json.loads(json.dumps(to_json(facts)))) == facts
    shown = capsys.readouterr().err.splitlines()
    lines = [f"{label:<12}{text}" for label, text in rows(facts)]
    assert [line for line in shown if line in lines] == lines
    assert [tuple(row) for row in read_run(tmp_path / "out" / "test-metrics.jsonl")["summary"]] == list(rows(facts))


@pytest.mark.slow
def test_loras_merged_into_the_base_are_named_with_their_hashes(train, tmp_path):
    from library.files.hashes import sha256

    assert train("--output_name", "first", "--max_train_steps", "1") == 0
    file = tmp_path / "out" / "first.safetensors"
    assert train("--max_train_steps", "1", "--base_weights", str(file), "--base_weights_multiplier", "0.5") == 0
    facts = record_of(tmp_path).facts
    assert facts is not None
    (merged,) = facts.model.base_weights
    assert (merged.file, merged.multiplier, merged.sha256) == (str(file), 0.5, sha256(file))
    assert merged.model_hash is not None


def test_without_monitoring_there_is_none(train, tmp_path):
    assert train("--no-monitoring", "--max_train_steps", "1") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test.safetensors"]


def test_a_stopped_run_and_the_rest_of_it(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train() == 128 + signal.SIGINT
    session = record_of(tmp_path).session
    assert (session.status, session.reason, session.steps_done) == ("stopped", "SIGINT", 2)
    assert train("--resume", "latest") == 0
    found = record_of(tmp_path)
    assert [item.status for item in found.sessions] == ["stopped", "finished"]
    assert found.sessions[0] == session
    assert [(item.first_step, item.steps_done) for item in found.sessions] == [(0, 2), (2, 4)]
    assert {item.name for item in found.files} == {
        *("test-step00000002.safetensors", "test-step00000002-state", "test.safetensors")
    }


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [(UserError("no room"), 2, "no room"), slow((ValueError("odd"), None, "ValueError: odd"))],
)
def test_a_failed_run(train, tmp_path, monkeypatch, error, code, reason):
    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", fail)
        if code is None:
            with pytest.raises(ValueError, match="odd"):
                train()
        else:
            assert train() == code
    session = record_of(tmp_path).session
    assert (session.status, session.reason, session.steps_done) == ("failed", reason, 0)
    assert train() == 0  # nothing was saved: it is not in the way
    assert record_of(tmp_path).session.status == "finished"


def test_a_run_that_fails_while_its_models_load(train, tmp_path, monkeypatch):
    from library.models.stable_diffusion import StableDiffusion

    def fail(*_: Any, **__: Any) -> None:
        raise UserError("the VAE is broken")

    monkeypatch.setattr(StableDiffusion, "encode_images", fail)
    assert train() == 2
    found = record_of(tmp_path)
    assert (found.session.status, found.session.reason, found.facts) == ("failed", "the VAE is broken", None)


@pytest.mark.slow
def test_secrets_are_in_no_record(train, tmp_path):
    (tmp_path / "key.toml").write_text('wandb_api_key = "0123456789abcdef"')
    for words in (
        ("--wandb_api_key", "0123456789abcdef"),
        ("--wandb_api_key=0123456789abcdef",),
        ("--config_file", str(tmp_path / "key.toml")),
    ):
        assert train("--max_train_steps", "1", "--overwrite", *words) == 0
        text = (tmp_path / "out" / "test-run.json").read_text(encoding="utf-8")
        assert "0123456789abcdef" not in text
        settings = record_of(tmp_path).settings
        assert settings.given["wandb_api_key"].value == settings.in_effect["wandb_api_key"] == "(given)"


def test_a_command_line_without_secrets():
    words = ["--seed", "1", "--wandb_api_key", "a b", "c", "--max_train_steps=3"]
    assert without_secrets(words) == ["--seed", "1", "--wandb_api_key", "(given)", "(given)", "--max_train_steps=3"]
    options = parse([*NEEDED, "--wandb_api_key=k", "--seed", "7"])
    assert options.command == (*NEEDED, "--wandb_api_key=(given)", "--seed", "7")
    assert recording.in_effect(options, seed=9)["seed"] == 9
