"""The command `find_rank`: a sweep on the quickstart's base, its resuming, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from library.config.command import run
from library.config.parser import parse
from library.evaluation import find_rank
from library.evaluation import sweep as sweeps
from tests.conftest import BASE, PATIENCE, forget_accelerator

Commands = list[list[str]]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """The trainings run in this process, which is faster; the commands that were started are in the list."""
    from train_network import main

    started: Commands = []

    def call(command: Sequence[str]) -> int:
        assert command[0] == sys.executable
        assert Path(command[1]).name == "train_network.py"
        started.append(list(command[2:]))
        forget_accelerator()
        return main(list(command[2:]))

    monkeypatch.setattr(sweeps, "_run", call)
    return started


def words(folder: Path, *more: str) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(folder / "data"), "--cache_latents"),
        *("--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2", "--output_name", "fox"),
        *("--output_dir", str(folder / "out"), "--learning_rate", "1e-3", "--seed", "3", "--max_train_epochs", "2"),
        *("--network_dim", "8", "--network_alpha", "4", "--validation_split", "0.34", "--no-report", "--no-loss_plot"),
        *more,
    ]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "out" / "fox-ranks" / "find-rank.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sweep(folder: Path, *own: str, more: Sequence[str] = ()) -> int:
    return run(find_rank.main, [*own, "--", *words(folder, *more)])


@pytest.mark.slow
def test_a_sweep_and_what_it_does_the_second_time(
    image_folder: Path, tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, "--ranks", "2,1", "--seeds", "2") == 0
    first = rows(tmp_path)
    assert [(row["rank"], row["alpha"], row["seed"]) for row in first] == [
        *(("1", "0.5", "3"), ("1", "0.5", "4"), ("2", "1", "3"), ("2", "1", "4"))
    ]
    assert len(commands) == 4
    assert len({row["base_loss"] for row in first}) == 1  # the same images and noise for both seeds
    assert len({row["lowest_loss"] for row in first}) == 4
    folder = tmp_path / "out" / "fox-ranks"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []  # finished runs need no state
    said = capsys.readouterr().out
    assert "the knee: rank" in said
    assert "±" in said
    assert (folder / "find-rank.png").stat().st_size > 5000

    assert sweep(tmp_path, "--ranks", "1,2,3", "--seeds", "1") == 0
    assert len(commands) == 5  # rank 3 alone
    assert commands[-1][commands[-1].index("--network_dim", 20) + 1 :][:3] == ["8", "--network_alpha", "4"]
    assert rows(tmp_path)[:2] == [first[0], first[2]]

    assert sweep(tmp_path, "--ranks", "1", more=["--learning_rate", "2e-3"]) == 2
    assert "rank 1, seed 3: --learning_rate 0.001 there, 0.002 here" in capsys.readouterr().err
    assert len(commands) == 5


@pytest.mark.parametrize(
    ("rule", "given", "alphas"),
    [
        ("ratio", ["--network_alpha", "4"], [2, 8]),
        ("ratio", [], [4, 16]),
        ("sqrt", ["--network_alpha", "4"], [2.82843, 5.65685]),
        ("sqrt", [], [5.65685, 11.3137]),
        ("fixed", ["--network_alpha", "4"], [4, 4]),
        ("fixed", [], [1, 1]),
    ],
)
def test_alpha_follows_the_settings_or_is_the_rank(
    image_folder: Path, tmp_path: Path, rule: str, given: list[str], alphas: list[float]
) -> None:
    """At a rank of 8 in the settings."""
    all_words = words(tmp_path)
    place = all_words.index("--network_alpha")
    all_words[place : place + 2] = given
    wanted = find_rank.FindRankOptions(ranks=(4, 16), alpha=rule)  # type: ignore[arg-type]
    assert [one.alpha for one in find_rank.planned(parse(all_words), all_words, wanted)] == alphas


@pytest.mark.slow
def test_an_interrupted_run_resumes(
    image_folder: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is made one that was stopped after its first epoch: the rest has the same losses."""
    with monkeypatch.context() as patched:
        patched.setattr(sweeps, "_forget_states", lambda one: None)
        assert sweep(tmp_path, "--ranks", "2") == 0
    before = rows(tmp_path)
    folder = tmp_path / "out" / "fox-ranks"
    record = json.loads((folder / "rank2-seed3-run.json").read_text())
    record["sessions"][-1]["status"] = "stopped"
    (folder / "rank2-seed3-run.json").write_text(json.dumps(record))
    shutil.rmtree(folder / "rank2-seed3-state")
    (folder / "rank2-seed3.safetensors").unlink()
    assert sweep(tmp_path, "--ranks", "2") == 0
    assert commands[-1][-2:] == ["--resume", "latest"]
    after = rows(tmp_path)
    assert len(json.loads((folder / "rank2-seed3-run.json").read_text())["sessions"]) == 2
    assert [row | {"seconds": ""} for row in after] == [row | {"seconds": ""} for row in before]


@pytest.mark.parametrize(
    ("own", "more", "said"),
    [
        ([], ["--validation_split", "0"], "add --validation_split 0.1"),
        (["--rank", "4"], [], "--rank: unknown option, did you mean 'ranks'?"),
        (["--learning_rate", "1"], [], "options of train_network.py stand behind --"),
        (["--ranks", "4,eight"], [], "'eight' is not a whole number"),
        (["--ranks", "0,4"], [], "'0,4' is not a list of ranks"),
        ([], ["--lerning_rate", "1"], "did you mean 'learning_rate'?"),
        ([], ["--network_module", "networks.ia3"], "--network_module networks.ia3"),
        ([], ["--dry_run"], "--dry_run: leave it out"),
        ([], ["--train_data_dir", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_named_before_a_training(
    image_folder: Path,
    tmp_path: Path,
    commands: Commands,
    capsys: pytest.CaptureFixture[str],
    own: list[str],
    more: list[str],
    said: str,
) -> None:
    assert sweep(tmp_path, *own, more=more) == 2
    assert said in capsys.readouterr().err
    assert commands == []
    assert not (tmp_path / "out").exists()


def test_a_training_that_fails_ends_the_sweep(
    image_folder: Path, tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, "--ranks", "1,2", more=["--optimizer_type", "Nothing"]) == 2
    assert len(commands) == 1
    assert "rank 1, seed 3: ended with exit code 2; the same command continues the sweep" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from library.evaluation.find_rank import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_stopped_sweep_continues(image_folder: Path, tmp_path: Path) -> None:
    """In processes of its own: SIGTERM reaches the training, which saves, and the same command goes on."""
    more = ["--max_train_epochs", "40", "--validate_every_n_epochs", "40"]
    command = [sys.executable, "-m", "library.evaluation.find_rank", "--ranks", "1", "--", *words(tmp_path, *more)]
    folder = tmp_path / "out" / "fox-ranks"
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + PATIENCE
        while not list(folder.glob("rank1-seed3-0*-state")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert json.loads((folder / "rank1-seed3-run.json").read_text())["sessions"][-1]["status"] == "stopped"
    assert subprocess.run(command, timeout=PATIENCE, check=False).returncode == 0
    sessions = json.loads((folder / "rank1-seed3-run.json").read_text())["sessions"]
    assert [one["status"] for one in sessions] == ["stopped", "finished"]
    assert sessions[1]["first_step"] > 0
