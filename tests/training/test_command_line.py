"""The program as a user meets it: dry runs, mistakes, Ctrl-C. In processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import BASE, ROOT


def command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "train_network.py"), *words]


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture
def words(image_folder: Path, tmp_path: Path) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(image_folder)),
        *("--caption_extension", ".txt", "--resolution", "64", "--output_dir", str(tmp_path / "out")),
        *("--network_dim", "4", "--learning_rate", "1e-3", "--seed", "1"),
    ]


def test_dry_run_tells_everything_and_writes_nothing(words, tmp_path):
    result = run(
        *words, "--train_batch_size", "2", "--max_train_epochs", "3", "--save_every_n_epochs", "1", "--dry_run"
    )
    assert result.returncode == 0, result.stderr
    for expected in (
        "sd_v1, epsilon",
        "text_encoder 18 modules, unet 120 modules, 139,776 trainable parameters",
        "6 images × 2; captions: 6 found, 0 missing, 0 empty",
        "0 cut off at 75 tokens",
        "64 × 64: 6 images, 12 with repeats, 6 batches",
        "18 steps; an epoch has 6 of them (6 batches), so 3 epochs",
        "2 images a step: 2 × 1 accumulated × 1 process",
        "text_encoder 0.001, unet 0.001; constant; AdamW",
        "8.01 bytes a parameter",
        "activations and gradients",
        "3 files of",
        str(tmp_path / "out" / "last.safetensors"),
    ):
        assert expected in result.stdout, f"{expected!r} is missing in:\n{result.stdout}"
    assert not (tmp_path / "out").exists()


def test_dry_run_measures_a_step(words):
    result = run(*words, "--max_train_steps", "1000", "--dry_run=measure")
    assert result.returncode == 0, result.stderr
    assert "s a step, measured;" in result.stdout
    assert "for 1000 steps" in result.stdout


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--learnig_rate", "1"], "--learnig_rate: unknown option, did you mean 'learning_rate'?"),
        (["--lr_scheduler", "cosin"], "did you mean 'cosine'?"),
        (["--learning_rate", "fast"], "--learning_rate: 'fast' is not a number"),
        (["--network_args", "conv_dmi=4"], "did you mean 'conv_dim'?"),
        (["--network_args", "conv_dim=four"], "conv_dim: 'four' is not a whole number"),
        (["--network_module", "networks.lorra"], "did you mean 'networks.lora'?"),
        (["--train_data_dir", "nowhere"], "no such folder: nowhere"),
        (["--pretrained_model_name_or_path", "quickstart/bse"], "did you mean 'quickstart/base'?"),
        (["--network_weights", "quickstart/none.safetensors"], "quickstart/none.safetensors: no such file"),
        (["--config_file", "configs/quickstrat.toml"], "did you mean 'configs/quickstart.toml'?"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_ends_fast_with_its_place_and_the_nearest_right_name(words, wrong, said):
    start = time.perf_counter()
    result = run(*words, *wrong)
    seconds = time.perf_counter() - start
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert "torch" not in result.stderr
    assert seconds < 10  # a tenth of that on an idle machine; a loaded model would take longer than this


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--optimizer_type", "AdamX"], "unknown optimizer 'AdamX', did you mean 'AdamW'?"),
        (["--optimizer_args", "weight_deca=0.1"], "did you mean 'weight_decay'?"),
        (["--optimizer_type", "absent_package.Optimizer"], "pip install absent_package"),
        (["--resolution", "66"], "must be a multiple of 4, such as 64 or 68"),
        (["--lr_scheduler", "constant", "--lr_warmup_steps", "10"], "use --lr_scheduler constant_with_warmup"),
        (["--vae", "quickstart/bas"], "did you mean 'quickstart/base'?"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_that_needs_packages_to_be_seen(words, wrong, said):
    result = run(*words, *wrong)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one process there")
@pytest.mark.parametrize("gone", [False, True], ids=["Ctrl-C", "a terminal that is closed"])
def test_a_signal_saves_what_was_learnt(words, tmp_path, gone):
    """Ctrl-C also ends the `tee` that a run is piped into; the shell and the terminal both send SIGHUP."""
    process = subprocess.Popen(
        command(*words, "--max_train_steps", "100000", "--save_every_n_steps", "2"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = tmp_path / "out" / "at-step00000002.safetensors"
    for _ in range(600):
        if first.exists():
            break
        time.sleep(0.1)
    if gone:
        process.stderr.close()
        process.send_signal(signal.SIGHUP)
        time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 129
    else:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # launchers pass on what the terminal has sent to all
        _, messages = process.communicate(timeout=60)
        assert process.returncode == 130, messages
        assert "stopping after this step" in messages
        assert "Traceback" not in messages
    newest = max((tmp_path / "out").glob("*.safetensors"))
    assert newest.with_name(f"{newest.stem}-state").is_dir()
    assert all(tensor.isfinite().all() for tensor in load_file(newest).values())


def test_it_runs_from_another_folder_and_under_spawn(words, tmp_path):
    """Windows starts its workers by importing the program anew; so does this."""
    code = (
        "import multiprocessing, sys; multiprocessing.set_start_method('spawn'); sys.path.insert(0, sys.argv[1]); "
        "from train_network import main; sys.exit(main(sys.argv[2:]))"
    )
    script = tmp_path / "start.py"
    script.write_text("if __name__ == '__main__':\n    " + code.replace("; ", "\n    ") + "\n")
    arguments = [*words, "--max_train_steps", "2", "--max_data_loader_n_workers", "2", "--no-loss_plot"]
    result = subprocess.run(
        [sys.executable, str(script), str(ROOT), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "last.safetensors").exists()
