"""The program as a user meets it: dry runs, mistakes, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import BASE, PATIENCE, ROOT, copy_images
from tests.quick import quick
from train_network import main


def command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "train_network.py"), *words]


def words_for(folder: Path) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(folder / "data")),
        *("--caption_extension", ".txt", "--resolution", "64", "--output_dir", str(folder / "out")),
        *("--network_dim", "4", "--learning_rate", "1e-3", "--seed", "1"),
    ]


@pytest.fixture
def words(image_folder: Path, tmp_path: Path) -> list[str]:
    return words_for(tmp_path)


def test_dry_run_tells_everything_and_writes_nothing(words, tmp_path, capsys):
    more = ("--train_batch_size", "2", "--max_train_epochs", "3", "--save_every_n_epochs", "1", "--dry_run")
    assert main([*words, *more]) == 0
    told = capsys.readouterr().out
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
        "a training step: weights",
        "3 files of",
        str(tmp_path / "out" / "last.safetensors"),
        "last-run.json",
        "last-metrics.jsonl",
    ):
        assert expected in told, f"{expected!r} is missing in:\n{told}"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_dry_run_measures_a_step(words, capsys):
    assert main([*words, "--max_train_steps", "1000", "--dry_run=measure"]) == 0
    told = capsys.readouterr().out
    assert "s a step, measured;" in told
    assert "for 1000 steps" in told


MISTAKES = {
    "--learnig_rate=1": "--learnig_rate: unknown option, did you mean 'learning_rate'?",
    "--lr_scheduler=cosin": "did you mean 'cosine'?",
    "--learning_rate=fast": "--learning_rate: 'fast' is not a number",
    "--network_args=conv_dmi=4": "did you mean 'conv_dim'?",
    "--network_args=conv_dim=four": "conv_dim: 'four' is not a whole number",
    "--network_module=networks.lorra": "did you mean 'networks.lora'?",
    "--train_data_dir=nowhere": "no such folder: nowhere",
    "--pretrained_model_name_or_path=quickstart/bse": "did you mean 'quickstart/base'?",
    "--network_weights=quickstart/none.safetensors": "quickstart/none.safetensors: no such file",
    "--config_file=configs/quickstrat.toml": "did you mean 'configs/quickstart.toml'?",
}
TRY = """
import contextlib, io, json, sys
from train_network import main
for mistake in {mistakes}:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = main([*{words}, mistake])
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue(), [name for name in ("diffusers", "transformers") if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By mistake: the exit code, what stands on stderr, and what was loaded of the packages that take seconds."""
    folder = tmp_path_factory.mktemp("mistakes")
    copy_images(folder / "data" / "2_style")
    code = TRY.format(mistakes=list(MISTAKES), words=words_for(folder))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return dict(zip(MISTAKES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_fast_with_its_place_and_the_nearest_right_name(ends, mistake):
    code, said, loaded = ends[mistake]
    assert code == 2
    assert MISTAKES[mistake] in said
    assert "Traceback" not in said
    assert not loaded  # no model was looked at


def test_a_mistake_ends_the_process(words):
    """What the shell sees: exit code 2, and the message without a traceback."""
    done = subprocess.run(command(*words, "--lr_scheduler", "cosin"), cwd=ROOT, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert done.stderr.endswith(b"did you mean 'cosine'?\n")
    assert b"Traceback" not in done.stderr


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
def test_a_mistake_that_needs_packages_to_be_seen(words, wrong, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main([*words, *wrong]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one process there")
@pytest.mark.parametrize("gone", quick([False, True], False), ids=["Ctrl-C", "a terminal that is closed"])
def test_a_signal_saves_what_was_learnt(words, tmp_path, gone):
    """Ctrl-C also ends the `tee` that a run is piped into; the shell and the terminal both send SIGHUP."""
    process = subprocess.Popen(
        command(*words, "--max_train_steps", "10000", "--save_every_n_steps", "2", "--no-report"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )
    first = tmp_path / "out" / "at-step00000002.safetensors"
    try:
        deadline = time.monotonic() + PATIENCE
        while not first.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if gone:
            process.stderr.close()
            process.send_signal(signal.SIGHUP)
            time.sleep(0.05)
            process.send_signal(signal.SIGHUP)
            assert process.wait(timeout=PATIENCE) == 129
        else:
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)  # launchers pass on what the terminal has sent to all
            _, messages = process.communicate(timeout=PATIENCE)
            assert process.returncode == 130, messages
            assert "stopping after this step" in messages
            assert "Traceback" not in messages
    finally:
        process.kill()
    newest = max((tmp_path / "out").glob("*.safetensors"))
    assert newest.with_name(f"{newest.stem}-state").is_dir()
    assert all(tensor.isfinite().all() for tensor in load_file(newest).values())


@pytest.mark.slow
def test_it_runs_from_another_folder_and_under_spawn(words, tmp_path):
    """Windows starts its workers by importing the program anew; so does this."""
    code = (
        "import multiprocessing, sys; multiprocessing.set_start_method('spawn'); sys.path.insert(0, sys.argv[1]); "
        "from train_network import main; sys.exit(main(sys.argv[2:]))"
    )
    script = tmp_path / "start.py"
    script.write_text("if __name__ == '__main__':\n    " + code.replace("; ", "\n    ") + "\n")
    arguments = [*words, "--max_train_steps", "2", "--max_data_loader_n_workers", "1", "--no-loss_plot", "--no-report"]
    result = subprocess.run(
        [sys.executable, str(script), str(ROOT), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "last.safetensors").exists()
