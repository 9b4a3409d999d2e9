"""Objectives and schedules through the real command line: the rates that are used, and what the files say."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import BASE, ROOT
from tests.quick import quick
from tests.training.written import metadata

V_AND_MORE = (
    *("--zero_terminal_snr", "--scale_v_pred_loss_like_noise_pred", "--debiased_estimation_loss"),
    *("--loss_type", "smooth_l1", "--huber_schedule", "exponential", "--huber_c", "0.2", "--huber_scale", "1.5"),
    *("--noise_offset", "0.1", "--noise_offset_random_strength", "--adaptive_noise_scale", "0.05"),
    *("--multires_noise_iterations", "6", "--multires_noise_discount", "0.4"),
    *("--ip_noise_gamma", "0.05", "--ip_noise_gamma_random_strength", "--min_timestep", "10", "--max_timestep", "1000"),
    *("--weighting_scheme", "logit_normal", "--logit_mean", "0.5", "--logit_std", "1.5"),
    *("--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=2", "gamma=0.5"),
)


@pytest.mark.slow
def test_a_file_says_what_was_minimised(train, tmp_path):
    folder = tmp_path / "v"
    shutil.copytree(BASE, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    compare = ("--compare_prompts", "emoji of cat", "--compare_steps", "2")  # drawn from the same noise schedule
    assert train("--pretrained_model_name_or_path", str(folder), *V_AND_MORE, *compare) == 0
    facts = metadata(tmp_path)
    expected = {
        "zero_terminal_snr": "True",
        "debiased_estimation": "True",
        "min_snr_gamma": "None",
        "loss_type": "smooth_l1",
        "huber_schedule": "exponential",
        "huber_c": "0.2",
        "huber_scale": "1.5",
        "noise_offset": "0.1",
        "noise_offset_random_strength": "True",
        "adaptive_noise_scale": "0.05",
        "multires_noise_iterations": "6",
        "multires_noise_discount": "0.4",
        "ip_noise_gamma": "0.05",
        "ip_noise_gamma_random_strength": "True",
        "weighting_scheme": "logit_normal",
        "logit_mean": "0.5",
        "logit_std": "1.5",
        "lr_scheduler": "StepLR",
    }
    assert {name: facts[f"ss_{name}"] for name in expected} == expected
    assert facts["modelspec.timestep_range"] == "10,1000"
    assert facts["modelspec.prediction_type"] == "v"
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / "test.safetensors").values())


@pytest.mark.slow
def test_adafactor_is_the_schedule_of_that_optimizer(train, tmp_path, caplog, capsys):
    assert train("--optimizer_type", "Adafactor", "--lr_scheduler", "adafactor:1e-3", "--max_train_steps", "2") == 0
    assert "--lr_scheduler, --lr_scheduler_type and" not in caplog.text
    assert metadata(tmp_path)["ss_lr_scheduler"] == "adafactor"
    capsys.readouterr()
    for words in (("--optimizer_type", "AdamW"), ("--optimizer_args", "relative_step=False")):
        optimizer = ("--optimizer_type", "Adafactor", *words)
        assert train(*optimizer, "--lr_scheduler", "adafactor", "--overwrite") == 2
        assert "--lr_scheduler adafactor is the schedule that --optimizer_type Adafactor" in capsys.readouterr().err


@pytest.mark.slow
def test_a_flag_goes_before_a_folders_configuration(train, tmp_path, capsys):
    """Converted folders carry wrong ones; the noise offset is for models that predict noise."""
    words = ("--v_parameterization", "--zero_terminal_snr", "--noise_offset", "0.05")
    assert train(*words, "--max_train_steps", "2") == 0
    assert metadata(tmp_path)["modelspec.prediction_type"] == "v"
    assert metadata(tmp_path)["ss_zero_terminal_snr"] == "True"
    said = capsys.readouterr().err
    file = BASE / "scheduler" / "scheduler_config.json"
    assert f"--v_parameterization was given, but {BASE} predicts noise, according to {file}; the flag is used" in said
    assert said.count("predicts v, and users report that the offset ruins LoRAs") == 1
    assert train("--noise_offset", "0.05", "--dry_run") == 0
    assert train("--v_parameterization", "--noise_offset", "0", "--dry_run") == 0
    assert "the offset ruins" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--zero_terminal_snr",), "predicts noise"),
        (("--scale_v_pred_loss_like_noise_pred",), "predicts noise, not v"),
        (("--lr_scheduler", "cosine_with_min_lr"), "needs --lr_scheduler_min_lr_ratio"),
        (("--lr_scheduler_type", "CosineAnealingLR"), "did you mean 'CosineAnnealingLR'"),
    ],
)
def test_what_does_not_fit_ends_before_anything_is_encoded(train, capsys, monkeypatch, words, message):
    monkeypatch.setattr("library.data.dataset.TrainingData.cache_latents", None)  # calling it would be a TypeError
    assert train(*words) == 2
    assert message in capsys.readouterr().err


CURVE = ("--lr_scheduler", "cosine_with_min_lr", "--lr_scheduler_min_lr_ratio", "0.1", "--lr_warmup_steps", "1")


def assert_the_curve_was_logged(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (event,) = folder.rglob("events*")
    events = EventAccumulator(str(event.parent))
    events.Reload()
    curve = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3)]
    rates = [event.value for event in events.Scalars("lr/unet")]  # the first step is the warm-up's
    assert rates == pytest.approx([1e-3 * factor for factor in (0, *curve)])


@pytest.mark.parametrize("accumulation", quick(["1", "3"], "3"))
def test_the_curve_counts_steps_of_the_optimizer(train, tmp_path, accumulation):
    logs = ("--logging_dir", str(tmp_path / "logs"), "--network_train_unet_only")
    assert train(*CURVE, *logs, "--gradient_accumulation_steps", accumulation) == 0
    assert_the_curve_was_logged(tmp_path / "logs")


@pytest.mark.slow
def test_the_curve_counts_steps_of_the_optimizer_with_two_processes(tmp_path, image_folder):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_network.py"),
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(image_folder)),
        *("--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2", "--cache_latents"),
        *("--output_dir", str(tmp_path / "out"), "--network_dim", "4", "--learning_rate", "1e-3", "--seed", "1"),
        *(
            "--max_train_steps",
            "4",
            "--gradient_accumulation_steps",
            "2",
            "--no-loss_plot",
            "--network_train_unet_only",
        ),
        *("--logging_dir", str(tmp_path / "logs"), *CURVE),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_the_curve_was_logged(tmp_path / "logs")
