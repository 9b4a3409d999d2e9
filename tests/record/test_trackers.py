"""Logs for TensorBoard and Weights & Biases; the latter by a stand-in that records what it is told."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path

import pytest

from library.config.parser import parse
from library.errors import UserError
from library.record import trackers
from library.run.trackers import logged_options, plan_trackers

REQUIRED = ("--pretrained_model_name_or_path", "base.safetensors", "--output_dir", "out")


def options(*words: str):
    return parse([*REQUIRED, *words])


@pytest.fixture
def wandb(monkeypatch):
    """A package `wandb` with the functions that accelerate and this project call."""
    calls: list[tuple] = []

    class Run:
        def log(self, values, step=None, **more):
            calls.append(("log", values, step))

        def finish(self):
            calls.append(("finish",))

    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.Error = type("Error", (Exception,), {})

    def login(key=None):
        calls.append(("login", key))
        if key == "wrong":
            raise fake.Error("API key is not valid")

    fake.login = login
    fake.init = lambda **settings: calls.append(("init", settings)) or Run()
    fake.config = types.SimpleNamespace(update=lambda values, **more: calls.append(("config", values)))
    fake.Image = lambda image, caption=None: ("image", image.size, caption)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    import accelerate.tracking as tracking

    monkeypatch.setattr(tracking, "is_wandb_available", lambda: True)
    monkeypatch.setattr(
        tracking, "get_available_trackers", lambda: [tracking.LoggerType.TENSORBOARD, tracking.LoggerType.WANDB]
    )
    return calls


def test_wandb_gets_curves_samples_and_settings(train, tmp_path, wandb):
    prompts, config, key = tmp_path / "p.txt", tmp_path / "trackers.toml", tmp_path / "key.toml"
    prompts.write_text("emoji of cat --w 64 --h 64 --s 1")
    config.write_text('[wandb]\nname = "from the file"\nentity = "me"\n[tensorboard]\nmax_queue = 3\n')
    key.write_text('wandb_api_key = "secret"')
    words = (
        "--log_with",
        "all",
        "--logging_dir",
        str(tmp_path / "logs"),
        "--log_tracker_name",
        "foxes",
        "--log_config",
    )
    more = ("--config_file", str(key), "--wandb_run_name", "mine", "--log_tracker_config", str(config))
    samples = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--max_train_steps", "3")
    assert train(*words, *more, *samples) == 0
    kinds = [call[0] for call in wandb]
    assert kinds == ["login", "init", "config", "log", "log", "log", "log", "finish"]
    assert wandb[0] == ("login", "secret")
    (folder,) = (tmp_path / "logs").iterdir()
    assert wandb[1][1] == {"project": "foxes", "name": "mine", "entity": "me", "dir": str(folder)}
    logged = wandb[2][1]
    assert logged["network_dim"] == 4
    assert not {"wandb_api_key", "output_dir", "train_data_dir"} & logged.keys()
    assert [step for kind, _, step in wandb[3:7]] == [1, 2, 2, 3]
    assert wandb[5][1] == {"sample_0": ("image", (64, 64), "emoji of cat")}
    assert {"loss/current", "lr/unet", "epoch"} <= wandb[3][1].keys()
    assert list(folder.rglob("events*"))  # TensorBoard's


def test_wandb_alone_needs_no_folder(train, wandb):
    assert train("--log_with", "wandb", "--max_train_steps", "1") == 0
    assert wandb[0] == ("init", {"project": "network_train"})


def test_a_refusal_of_wandbs_stops_the_run(train, tmp_path, wandb, capsys):
    assert train("--log_with", "wandb", "--wandb_api_key", "wrong") == 2
    message = capsys.readouterr().err
    assert "API key is not valid" in message
    assert "wandb stores a run's command line" in message
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for words in (("--log_with", "wandb"), ("--log_with", "all", "--logging_dir", "logs")):
        with pytest.raises(UserError, match=r"the package 'wandb' is not installed: pip install wandb"):
            plan_trackers(options(*words))


def test_which_trackers(tmp_path):
    assert plan_trackers(options()).names == ()
    plan = plan_trackers(options("--logging_dir", str(tmp_path), "--log_prefix", "x-"))
    assert plan.names == ("tensorboard",)
    assert Path(plan.folder).name.startswith("x-20")
    with pytest.raises(UserError, match="needs --logging_dir"):
        options("--log_with", "all")


def test_what_has_no_effect_is_said(caplog):
    plan_trackers(options("--log_prefix", "x", "--log_config", "--wandb_run_name", "y", "--log_tracker_name", "z"))
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "--log_prefix has no effect: nothing is logged",
        "--log_tracker_name has no effect: nothing is logged",
        "--log_config has no effect: nothing is logged",
        "--wandb_run_name has no effect: --log_with wandb is not given",
    ]


def test_the_trackers_file_is_checked(tmp_path, caplog):
    path = tmp_path / "t.toml"
    words = ("--logging_dir", str(tmp_path), "--log_tracker_config", str(path))
    for text in ("[tensorbord]\nmax_queue = 3", "tensorboard = 3"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"t.toml: tensor.*not a table"):
            plan_trackers(options(*words))
    path.write_text("[wandb]\nname = 'x'")
    assert plan_trackers(options(*words)).settings == {"tensorboard": {}}
    assert "[wandb] has no effect" in caplog.text


def test_settings_that_a_tracker_does_not_take_stop_the_run(train, tmp_path, capsys):
    path = tmp_path / "t.toml"
    path.write_text("[tensorboard]\nmax_que = 3")
    assert train("--logging_dir", str(tmp_path / "logs"), "--log_tracker_config", str(path)) == 2
    assert "max_que" in capsys.readouterr().err


def test_the_options_go_into_tensorboard(train, tmp_path):
    assert train("--logging_dir", str(tmp_path / "logs"), "--log_config", "--max_train_steps", "1") == 0
    (hparams,) = (tmp_path / "logs").rglob("hparams.yml")
    assert "network_dim: 4" in hparams.read_text()
    assert str(tmp_path) not in hparams.read_text()


def test_logged_options_are_plain_and_private():
    found = logged_options(options("--network_args", "conv_dim=4", "--wandb_api_key", "k", "--resolution", "512"))
    assert found["network_args"] == "('conv_dim=4',)"
    assert found["resolution"] == "(512, 512)"
    assert "k" not in found.values()


def test_logs_on_a_full_disk_cost_the_curves_and_not_the_run(caplog):
    class Full:
        def log(self, values, step):
            raise OSError(28, "No space left on device")

        def finish(self):
            raise OSError(28, "No space left on device")

    accelerator = Full()
    accelerator.trackers = [Full()]
    for step in (3, 4):
        trackers.tell(accelerator, {"loss/current": 1.0}, step=step)
    accelerator.trackers = [Full()]
    trackers.end(accelerator)
    assert caplog.messages == [
        "the logs end before step 3, training continues: No space left on device",
        "the end of the logs could not be written: No space left on device",
    ]
