"""The command `cross_validate`: every image is held out once, the averages, and what it refuses."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from library.config.command import run
from library.config.data.dataset_config import load_datasets
from library.config.fields import BadValue
from library.config.options.validation import read_fold
from library.config.parser import parse
from library.data.prepare import prepare
from library.errors import UserError
from library.evaluation import cross_validate, sweep
from library.evaluation.cross_validate import mean_and_error, planned, table
from library.evaluation.sweep import Outcome
from tests.conftest import forget_accelerator
from tests.evaluation.test_find_rank import words as own_words


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The trainings run in this process; the words of each are in the list."""
    from train_network import main

    started: list[list[str]] = []

    def call(command: Sequence[str]) -> int:
        started.append(list(command[2:]))
        forget_accelerator()
        return main(list(command[2:]))

    monkeypatch.setattr(sweep, "_run", call)
    return started


def words(folder: Path, *more: str) -> list[str]:
    every = own_words(folder)
    place = every.index("--validation_split")
    return [*every[:place], *every[place + 2 :], *more]


@pytest.mark.slow
def test_the_parts_are_trained_once_and_averaged(
    image_folder: Path, tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--max_train_epochs", "1", "--max_validation_steps", "1"]
    assert run(cross_validate.main, ["--folds", "2", "--", *words(tmp_path, *more)]) == 0
    folder = tmp_path / "out" / "fox-folds"
    with (folder / "cross-validation.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == ["1", "2"]
    first, second = (float(row["lowest_loss"]) for row in rows)
    said = capsys.readouterr().out
    assert f"loss {(first + second) / 2:.5f} ± {abs(first - second) / 2:.5f}" in said
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        *("part1of2-best.safetensors", "part1of2.safetensors", "part2of2-best.safetensors", "part2of2.safetensors")
    ]
    assert run(cross_validate.main, ["--folds", "2", "--", *words(tmp_path, *more)]) == 0
    assert len(commands) == 2, "finished runs are read"
    assert run(cross_validate.main, ["--folds", "2", "--", *words(tmp_path, *more, "--learning_rate", "2e-3")]) == 2
    assert "part 1 of 2: --learning_rate 0.001 there, 0.002 here" in capsys.readouterr().err


@pytest.mark.parametrize("group", ["", "name:(.)$"])
def test_every_image_is_held_out_once(image_folder: Path, tmp_path: Path, group: str) -> None:
    every = words(tmp_path, "--validation_group", group)
    held: list[str] = []
    trained: set[str] = set()
    for one in planned(parse(every), every, 3):
        wanted = one.options.validation
        prepared = prepare(
            load_datasets(one.options),
            multiple_of=8,
            seed=3,
            validation_group=wanted.validation_group,
            fold=wanted.validation_fold,
        )
        assert prepared.validation is not None
        names = {sample.path.name for sample in prepared.validation.samples}
        trains = {sample.path.name for sample in prepared.samples}
        assert not names & trains
        assert len(names | trains) == 6
        if group:
            assert not {name[-5] for name in names} & {name[-5] for name in trains}
        held += names
        trained |= trains
    assert sorted(held) == sorted(trained)
    assert len(held) == 6


def test_means_are_those_of_statistics() -> None:
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    mean, error = mean_and_error([2.0, 4.0, 4.0, 6.0])
    assert (mean, error) == (4.0, pytest.approx(math.sqrt(8 / 3) / 2))
    lines = list(table([Outcome(0.2, 0.1, 5, 1.0), Outcome(0.2, 0.15, 9, 1.0)]))
    assert "mean of 2 parts: loss 0.12500 ± 0.02500, lower than the base's by 37.50 ± 12.50 %" in lines[-2]
    assert lines[-1] == "the loss was lowest at step 5 to 9, the median is 7"


@pytest.mark.parametrize(
    ("own", "more", "said"),
    [
        (["--folds", "1"], [], "--folds: must be at least 2, not 1"),
        (["--fold", "3"], [], "--fold: unknown option, did you mean 'folds'?"),
        ([], ["--validation_split", "0.1"], "--validation_split: leave it out; --folds decides"),
        ([], ["--validation_fold", "1/2"], "--validation_fold: leave it out; --folds decides"),
        ([], ["--check_data"], "--check_data: leave it out; cross_validate trains new networks"),
        ([], ["--resume", "latest"], "--resume: leave it out"),
        ([], ["--validation_group", "latest"], "--validation_group latest: the newest images are one part"),
        (["--folds", "9"], [], "9 parts of 6 different images: at most as many"),
        (["--folds", "4"], ["--validation_group", "name:(.)"], "4 parts of "),
    ],
)
def test_mistakes_are_named(
    image_folder: Path,
    tmp_path: Path,
    commands: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    own: list[str],
    more: list[str],
    said: str,
) -> None:
    assert run(cross_validate.main, [*own, "--", *words(tmp_path, *more)]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_with_its_own_validation_is_not_divided(image_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.toml"
    folder = image_folder / "2_style"
    head = f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder}"\n'
    base = [*words(tmp_path), "--validation_fold", "1/2", "--dataset_config", str(file)]
    file.write_text(f'{head}validation_dir = "{folder}"\n')
    with pytest.raises(UserError, match="there is no folder to hold out a part of"):
        load_datasets(parse(base))
    file.write_text(f"{head}validation_split = 0.1\n")
    with pytest.raises(UserError, match="validation_split: --validation_fold takes its place"):
        load_datasets(parse(base))
    with pytest.raises(UserError, match="--validation_fold takes the place of --validation_split"):
        parse([*words(tmp_path), "--validation_fold", "1/2", "--validation_split", "0.1"])


@pytest.mark.parametrize("word", ["2", "0/5", "6/5", "1/1", "a/b", "1/", "-1/5"])
def test_what_is_no_part(word: str) -> None:
    with pytest.raises(BadValue, match="is no"):
        read_fold(word)
    assert read_fold("2/5") == (2, 5)
