"""The command `tasks`: its plans, what it refuses, the matrix, and a series on the quickstart's base."""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import toml

from library.config import parser
from library.config.command import run
from library.config.data import dataset_config
from library.evaluation import replay, tasks
from library.evaluation.after_tasks import BASE as BASE_ALONE
from library.evaluation.after_tasks import Matrix
from library.evaluation.tasks import TasksOptions, planned
from library.run.measured import measured_folders
from tests.conftest import BASE, IMAGES, copy_images, forget_accelerator


def held_out(folder: Path, first: int = 0) -> None:
    """Two captioned images that are not trained."""
    folder.mkdir(parents=True)
    for image in sorted((IMAGES / "validation").glob("*.png"))[first : first + 2]:
        for file in (image, image.with_suffix(".txt")):
            shutil.copy(file, folder)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`cats.toml` and `dogs.toml` with the folders that they train, and folders of held-out images."""
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "dogs"):
        copy_images(tmp_path / name / "1_x", 4)
        held_out(tmp_path / "held" / name)
        values = {
            "pretrained_model_name_or_path": str(BASE),
            "train_data_dir": name,
            "caption_extension": ".txt",
            "resolution": "64",
            "train_batch_size": 2,
            "cache_latents": True,
            "network_dim": 2,
            "output_dir": "out",
            "max_train_steps": 2,
            "learning_rate": 1e-2,
            "loss_plot": False,
            "report": False,
            "seed": 3,
        }
        (tmp_path / f"{name}.toml").write_text(toml.dumps(values))
    return tmp_path


def words_of(*against: str) -> list[list[str]]:
    wanted = TasksOptions(tasks=("cats.toml", "dogs.toml"), against=against)  # type: ignore[arg-type]
    return [list(task.words) for task in planned(wanted, ["cats", "dogs"], ["--learning_rate", "5e-3"])]


def after(words: Sequence[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_a_task_begins_where_the_one_before_ended(files: Path) -> None:
    first, second = words_of()
    assert "--network_weights" not in first
    assert after(second, "--network_weights") == str(Path("out/last-tasks-unprotected/1-cats.safetensors"))
    assert "--dim_from_weights" in second
    assert after(second, "--output_name") == "2-dogs"
    assert after(second, "--learning_rate") == "5e-3"


def test_the_words_of_each_protection(files: Path) -> None:
    _, ewc = words_of("ewc")
    assert after(ewc, "--ewc_data") == str(Path("out/last-tasks-ewc/2-dogs-earlier.toml"))
    first, progressive = words_of("progressive")
    assert "--base_weights" not in first
    assert after(progressive, "--base_weights").endswith("1-cats.safetensors")
    assert "--network_weights" not in progressive
    _, both = words_of("replay", "distillation")
    assert after(both, "--distillation_weight") == "1"
    assert after(both, "--dataset_config") == str(Path("out/last-tasks-distillation-replay/2-dogs-data.toml"))


def test_progressive_files_act_together(files: Path) -> None:
    wanted = TasksOptions(tasks=("cats.toml", "dogs.toml"), against=("progressive",))
    found = list(planned(wanted, ["cats", "dogs"], []))
    assert [[file.stem for file in task.files] for task in found] == [["1-cats"], ["1-cats", "2-dogs"]]


def test_what_replay_writes(files: Path) -> None:
    """The task's own data as it was, and the earlier tasks' folders with their shares."""
    specs = [
        dataset_config.load_datasets(parser.parse(["--config_file", f"{name}.toml", "--caption_prefix", f"{name} "]))
        for name in ("cats", "dogs")
    ]
    replay.write(files / "new" / "data.toml", specs[1], [specs[0], specs[0]], 0.3)
    (dataset,) = toml.loads((files / "new" / "data.toml").read_text())["datasets"]
    assert (dataset["resolution"], dataset["batch_size"]) == ([64, 64], 2)
    own, *earlier = dataset["subsets"]
    assert (own["image_dir"], own["caption_prefix"]) == (str(Path("dogs/1_x")), "dogs ")
    assert "share" not in own
    assert [one["share"] for one in earlier] == pytest.approx([0.15, 0.15])
    assert {one["image_dir"] for one in earlier} == {str(Path("cats/1_x"))}
    assert {one["caption_prefix"] for one in earlier} == {"cats "}
    # without the shares it is the data set that it was
    for one in dataset["subsets"]:
        one.pop("share", None)
    dataset["subsets"] = dataset["subsets"][:1]
    (files / "again.toml").write_text(toml.dumps({"datasets": [dataset]}))
    (again,) = dataset_config.load_datasets(
        parser.parse(["--config_file", "dogs.toml", "--train_data_dir=", "--dataset_config", "again.toml"])
    )
    from dataclasses import replace

    (spec,) = specs[1]
    assert replace(again.subsets[0], origin=spec.subsets[0].origin) == spec.subsets[0]
    assert replace(again, subsets=spec.subsets) == spec


def test_the_file_of_earlier_images(files: Path) -> None:
    """Their captions are as they were trained."""
    words = ["--config_file", "cats.toml", "--caption_prefix", "cats ", "--shuffle_caption"]
    specs = dataset_config.load_datasets(parser.parse(words))
    replay.write_earlier(files / "earlier.toml", [specs])
    options = parser.parse(["--config_file", "dogs.toml", "--ewc_data", "earlier.toml"])
    (found,) = measured_folders(options, dataset_config.load_datasets(options))
    assert (found.use, found.name, found.dataset.batch_size) == ("ewc", "earlier 1", 1)
    (subset,) = found.dataset.subsets
    assert (subset.image_dir, subset.caption_prefix) == (Path("cats/1_x"), "cats ")


def images(*names: str) -> list[str]:
    return ["--images", *(f"{name}=held/{name}" for name in names)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "cats.toml"], "at least two tasks"),
        (["--tasks", "cats.toml", "dog.toml"], "--tasks dog.toml: no such file, did you mean 'dogs.toml'?"),
        (["--tasks", "cats.toml", "other/cats.toml"], "two folders are called cats"),
        (["--tasks", "cats.toml", "dogs.toml", *images("cats")], "no held-out images of dogs: give dogs=FOLDER"),
        (["--tasks", "cats.toml", "dogs.toml", "--against", "ewd"], "'ewd' is not one of"),
        (["--tasks", "cats.toml", "dogs.toml", "--against", "progressive", "ewc"], "--against progressive ewc"),
        (["--tasks", "cats.toml", "dogs.toml", "--ewc_data", "cats"], "stand behind --"),
    ],
)
def test_what_is_refused(words: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "other").mkdir()
    (files / "other" / "cats.toml").write_text("")
    assert run(tasks.main, words) == 2
    assert message in capsys.readouterr().err
    assert not (files / "out").exists()


def test_images_that_a_task_trains(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(next((files / "dogs" / "1_x").glob("*.png")), files / "held" / "cats" / "again.png")
    assert run(tasks.main, ["--tasks", "cats.toml", "dogs.toml", *images("cats", "dogs")]) == 2
    assert "--images cats=held/cats: 1 of its 3 images are in the training data as well" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resume", "network_weights", "find_lr"])
def test_options_that_a_series_sets_itself(name: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--", f"--{name}", *([] if name == "find_lr" else ["latest"])]
    assert run(tasks.main, ["--tasks", "cats.toml", "dogs.toml", *images("cats", "dogs"), *more]) == 2
    assert f"task cats: --{name}: leave it out" in capsys.readouterr().err


def test_the_matrix_in_numbers() -> None:
    losses = {
        (BASE_ALONE, "a"): [1.0, 3.0], ("a", "a"): [0.5, 1.5], ("b", "a"): [0.75, 2.25],
        (BASE_ALONE, "b"): [2.0, 2.0], ("a", "b"): [2.2, 2.2], ("b", "b"): [1.0, 1.0],
        (BASE_ALONE, "other"): [1.0, 1.0], ("a", "other"): [1.1, 1.1], ("b", "other"): [1.3, 1.3],
    }  # fmt: skip
    found = Matrix(["a", "b"], ["a", "b", "other"], losses)
    assert found.forgotten("a").percent == pytest.approx(50)  # since the task a was trained
    assert found.forgotten("other").percent == pytest.approx(30)  # over the base
    assert found.forgotten("a").error == pytest.approx(0, abs=1e-9)  # the same share of each image
    rows = {(time, folder): float(percent) for time, folder, _, _, _, percent, _ in found.rows()}
    assert rows == pytest.approx({
        ("a", "a"): -50, ("a", "b"): 10, ("a", "other"): 10, ("b", "a"): -25, ("b", "b"): -50, ("b", "other"): 30,
    })  # fmt: skip
    lines = list(found.table())
    assert lines[1].split() == ["after", "the", "task", "a", "b", "other"]
    assert lines[-2] == "a: +50.00 ± 0.00 %"
    assert lines[-1] == "other: +30.00 ± 0.00 %"


@pytest.mark.slow
@pytest.mark.parametrize("against", [("replay",), ("ewc", "distillation"), ("progressive",)])
def test_a_series_that_is_interrupted(
    against: tuple[str, ...], files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first task is trained, the second fails; the same command trains only that one, and then measures."""
    from train_network import main as train

    started: list[list[str]] = []

    def call(command: Sequence[str]) -> int:
        assert command[0] == sys.executable
        started.append(list(command[2:]))
        forget_accelerator()
        return 130 if len(started) == 2 else train(list(command[2:]))

    monkeypatch.setattr("library.evaluation.sweep._run", call)
    held_out(files / "held" / "other", first=5)
    words = ["--tasks", "cats.toml", "dogs.toml", *images("cats", "dogs", "other")]
    words += ["--against", *against] if against else []
    assert run(tasks.main, words) == 130
    assert "task dogs: ended with exit code 130" in capsys.readouterr().err
    assert run(tasks.main, words) == 0
    assert [after(command, "--output_name") for command in started] == ["1-cats", "2-dogs", "2-dogs"]
    folder = files / "out" / f"last-tasks-{'-'.join(sorted(against)) or 'unprotected'}"
    with (folder / "tasks.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["after_task"], row["folder"]) for row in rows] == [
        (time, name) for time in ("cats", "dogs") for name in ("cats", "dogs", "other")
    ]
    said = capsys.readouterr().out
    assert "forgotten, in %" in said
    assert run(tasks.main, words) == 0
    assert len(started) == 3
    assert run(tasks.main, [*words, "--", "--learning_rate", "1e-3"]) == 2
    assert "--learning_rate 0.01 there, 0.001 here" in capsys.readouterr().err
