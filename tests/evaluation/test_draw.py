"""The command `draw`, on the quickstart's base."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.config.command import run
from library.evaluation.draw import main
from tests.conftest import BASE, PATIENCE
from tests.evaluation.conftest import PROMPT, Trained


def draw(out: Path, *words: str) -> int:
    return run(main, [*words, "--pretrained_model_name_or_path", str(BASE), "--output_dir", str(out)])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def singles(out: Path) -> dict[str, np.ndarray]:
    """Row and column, "00-01" → pixels."""
    return {path.name[:5]: pixels(path) for path in sorted((out / "grid").glob("*.png"))}


@pytest.mark.slow
def test_it_renders_what_training_renders(trained: Trained, tmp_path: Path) -> None:
    """The samples after the last step, of a prompt with a seed and of one without: to the bit."""
    words = ("--sample_prompts", str(trained.prompts), "--seed", "1", "--singles")
    assert draw(tmp_path, str(trained.both), *words) == 0
    found = singles(tmp_path)
    assert list(found) == ["00-00", "00-01", "01-00", "01-01"]
    for sample, cell in zip(trained.samples, ("00-01", "01-01"), strict=True):
        assert np.array_equal(pixels(sample), found[cell])
    assert not np.array_equal(found["00-00"], found["00-01"])
    assert not np.array_equal(found["00-01"], found["01-01"])


@pytest.mark.slow
def test_files_are_switched_without_traces(trained: Trained, tmp_path: Path) -> None:
    columns = (f"{trained.both}:0.5+{trained.unet}:0.5", str(trained.unet), "--multipliers", "1", "0")
    words = ("--prompt", PROMPT, "--seeds", "5", "6", "--singles")
    assert draw(tmp_path / "many", *columns, *words) == 0
    many = singles(tmp_path / "many")
    assert len(many) == 10
    for row in ("00", "01"):
        base, together, at_zero, unet, again = (many[f"{row}-{column:02d}"] for column in range(5))
        assert np.array_equal(base, at_zero)
        assert np.array_equal(base, again)
        assert not np.array_equal(together, unet)
    assert draw(tmp_path / "one", str(trained.unet), "--prompt", PROMPT, "--seeds", "6", "--singles") == 0
    assert np.array_equal(singles(tmp_path / "one")["00-01"], many["01-03"])
    with (tmp_path / "many" / "grid.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["5"] * 5 + ["6"] * 5
    names = ["base", "both × 0.5 + unet × 0.5", "both × 0 + unet × 0", "unet", "unet × 0"]
    assert [row["lora"] for row in rows[:5]] == names
    assert all(Path(row["file"]).is_file() for row in rows)


def test_names_of_files_hold_no_path(trained: Trained, tmp_path: Path) -> None:
    assert draw(tmp_path, "--prompt", "../../up/and: away? * --w 64 --h 64 --s 1 --l 1", "--singles") == 0
    assert [path.name for path in (tmp_path / "grid").iterdir()] == ["00-00-base-..-..-up-and-away.png"]


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grid.png").write_text("mine")
    assert draw(tmp_path, "--prompt", PROMPT) == 2
    assert "--overwrite to replace them" in capsys.readouterr().err
    assert (tmp_path / "grid.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no prompt is given"),
        (["--prompt", "a fox --q 3"], "--prompt 1: unknown flag --q"),
        (["--prompt", "a fox --w wide"], "--prompt 1: width: 'wide' is not a whole number"),
        (["--sample_prompts", "{folder}/promts.txt"], "did you mean '{folder}/prompts.txt'?"),
        (["--prompt", "a fox", "--sample_sampler", "eular"], "did you mean 'euler'?"),
        (["--prompt", "a fox", "--clip", "{folder}"], "--clip {folder}: no CLIP model's folder"),
        (["--prompt", "a fox", "--multiplier", "2"], "did you mean 'multipliers'?"),
        (["--prompt", "a fox", "--multipliers", "1", "1"], "two columns are the same"),
        (["--prompt", "a fox", "--seeds", "-1"], "--seeds: must be at least 0, not -1"),
    ],
)
def test_mistakes_are_named(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    given = [str(trained.unet), *(word.format(folder=trained.folder) for word in words)]
    assert draw(tmp_path, *given) == 2
    assert said.format(folder=trained.folder) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch() -> None:
    code = "import sys; from library.evaluation.draw import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
