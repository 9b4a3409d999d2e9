"""Forgetting, further validation sets and the gap, through the command line and against other ways to the numbers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.config.options import Options
from library.data.prepare import prepare, some_trained
from library.errors import UserError
from library.record.forgetting import Forgetting, advice
from library.run.measured import measured_folders, measured_sets
from library.training.hook import Hook, Step
from library.training.hooks.forgetting import ForgettingMeter
from tests.conftest import BASE, IMAGES
from tests.training.test_resume import stop_after
from tests.training.written import same, weights

Train = Callable[..., int]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two folders of three captioned images that are not trained."""
    made = {}
    for name in ("validation", "report"):
        made[name] = tmp_path / f"of_{name}"
        made[name].mkdir()
        for image in sorted((IMAGES / name).glob("*.png"))[:3]:
            shutil.copy(image, made[name])
            shutil.copy(image.with_suffix(".txt"), made[name])
    return made


def noted(folder: Path, kind: str, name: str = "test") -> list[tuple[int, dict[str, Any]]]:
    """(step, numbers) of the lines of this kind in a run's metrics."""
    text = (folder / "out" / f"{name}-metrics.jsonl").read_text(encoding="utf-8")
    return [(line["step"], line[kind]) for line in map(json.loads, text.splitlines()) if kind in line]


# --- the number -------------------------------------------------------------------------------------------------------


def test_the_rate_is_of_the_bases_loss() -> None:
    one = Forgetting(3, {100: 0.24, 900: 0.02}, {100: 0.18, 900: 0.02})
    assert one.rate == pytest.approx((0.13 - 0.10) / 0.10)
    assert (one.at(100), one.at(900)) == (pytest.approx(1 / 3), 0.0)
    assert one.line() == pytest.approx({"loss": 0.13, "base": 0.1, "rate": 0.3, "t100": 1 / 3, "t900": 0.0})
    assert one.in_words() == "+30.0 % (+33.3 % at t 100, +0.0 % at t 900)"


@pytest.mark.parametrize(
    ("loss", "level"), [(0.9, 0), (1.0, 0), (1.0999, 0), (1.1001, 1), (1.2999, 1), (1.3001, 2), (math.nan, 2)]
)
def test_the_levels_of_warning(loss: float, level: int) -> None:
    assert Forgetting(1, {500: loss}, {500: 1.0}).level == level


def test_each_level_is_warned_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    losses = iter([1.0, 1.05, 1.2, 1.15, 1.4, 1.5])
    monkeypatch.setattr("library.training.hooks.forgetting.measure", lambda *_: {500: next(losses)})
    data = SimpleNamespace(plan=lambda epoch: [], samples=[], seed=0)
    hook = ForgettingMeter(
        {"cats": data},  # type: ignore[dict-item]
        lambda step: True,
        timesteps=[500],
        most_batches=None,
        starts_as_base=True,
    )
    lines: list[tuple[int, Any]] = []

    class Seen(Hook[Any]):
        def noted(self, run: Any, step: int, values: Any) -> None:
            lines.append((step, values))

    off = torch.no_grad  # any context
    run: Any = SimpleNamespace(
        hooks=(hook, Seen()),
        network=SimpleNamespace(off=off),
        position=SimpleNamespace(done=0),
        accelerator=SimpleNamespace(trackers=[], is_main_process=True),
    )
    hook.before_training(run)
    for step in range(1, 6):
        assert not hook.end_of_step(run, Step(step, 0))
    rates = [values["forgetting"]["cats"]["rate"] for _, values in lines if "forgetting" in values]
    assert rates == pytest.approx([0.0, 0.05, 0.2, 0.15, 0.4, 0.5])
    signs = [(step, values["warning"]["sign"]) for step, values in lines if "warning" in values]
    assert signs == [(2, "forgetting"), (4, "severe forgetting")]
    assert "the loss on cats is 40.0 % above the base model's: " + advice(2) in caplog.text
    assert hook.latest["cats"].rate == pytest.approx(0.5)


# --- the images -------------------------------------------------------------------------------------------------------


@pytest.fixture
def found(image_folder: Path, tmp_path: Path, options: Callable[..., Options]) -> Callable[..., Any]:
    """Prepares the training data and the folders of these words."""

    def prepared(*words: str) -> Any:
        from library.config.data.dataset_config import load_datasets

        common = ("--train_data_dir", str(image_folder), "--resolution", "64", "--caption_extension", ".txt")
        given = options(*common, *words)
        datasets = load_datasets(given)
        data = prepare(datasets, multiple_of=8, measures=True)
        measured = measured_folders(given, datasets)
        sets = measured_sets(measured, data.contents, multiple_of=8, skip_bad_images=False)
        return SimpleNamespace(datasets=datasets, data=data, folders=measured, sets=sets)

    return prepared


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., Options]:
    from library.config.parser import parse

    base = ["--pretrained_model_name_or_path", str(BASE), "--output_dir", str(tmp_path / "out")]
    return lambda *words: parse([*base, *words])


def test_captions_of_unrelated_images_have_no_trigger(found: Callable[..., Any], folders: dict[str, Path]) -> None:
    words = ("--validation_dir", f"more={folders['validation']}", "--forgetting_dir", str(folders["report"]))
    all_found = found("--caption_prefix", "flat ", *words)
    more, other = all_found.sets
    assert (more.name, more.use, other.name, other.use) == ("more", "validation", "of_report", "forgetting")
    assert {one.subset.caption_prefix for one in more.prepared.samples} == {"flat "}
    assert {one.subset.caption_prefix for one in other.prepared.samples} == {None}
    assert len(other.prepared.samples) == 3


def test_of_several_resolutions_the_first_is_measured_and_named(
    found: Callable[..., Any], folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    unrelated = ("--forgetting_dir", str(folders["report"]))
    sizes = ("--resolution=", "--resolutions", "96", "64")
    (one,) = found(*sizes, *unrelated).sets
    assert {placement.bucket for placement in one.prepared.placements} == {(96, 96)}
    said = "folders to measure are read at 96 × 96, the size of the first data set, and not at 64 × 64 as well"
    assert caplog.text.count(said) == 1
    caplog.clear()
    found(*unrelated)
    found(*sizes)
    assert "folders to measure" not in caplog.text


@pytest.mark.parametrize("option", ["forgetting_dir", "validation_dir"])
def test_images_that_are_trained_too_are_an_error(
    option: str, found: Callable[..., Any], folders: dict[str, Path], image_folder: Path
) -> None:
    trained = sorted((image_folder / "2_style").glob("*.png"))[0]
    shutil.copy(trained, folders["report"] / "another name.png")
    with pytest.raises(
        UserError, match=rf"^--{option} .*: 1 of its 4 images are in the training data as well"
    ) as error:
        found(f"--{option}", str(folders["report"]))
    assert f"(another name.png is {trained})" in str(error.value)


def test_folders_that_do_not_exist_and_twins(found: Callable[..., Any], folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"^--forgetting_dir a=.*of_reports: no such folder: .*of_report"):
        found("--forgetting_dir", f"a={folders['report']}s")
    with pytest.raises(UserError, match=r"two folders are called a: .*of_validation and .*of_report; give NAME=FOLDER"):
        found("--validation_dir", f"a={folders['validation']}", "--forgetting_dir", f"a={folders['report']}")
    with pytest.raises(UserError, match="the name before = is empty"):
        found("--forgetting_dir", f"={folders['report']}")


def test_trained_images_for_the_gap(found: Callable[..., Any], image_folder: Path) -> None:
    """So many different ones, each once, prepared as those held out; the choice does not depend on names or repeats."""
    shutil.copy(next((image_folder / "2_style").glob("*.png")), image_folder / "2_style" / "a copy.png")
    all_found = found("--flip_aug", "--shuffle_caption")
    chosen = some_trained(all_found.data, all_found.datasets, multiple_of=8, most=4)
    keys = [one.key for one in chosen.samples]
    assert len(set(keys)) == len(keys) == 4
    assert all(
        one.repeats == 1 and not one.subset.flip_aug and not one.subset.shuffle_caption for one in chosen.samples
    )
    for image in list((image_folder / "2_style").glob("*.png")):
        image.rename(image.with_name(f"x{image.name}"))
    again = found()
    assert {one.key for one in some_trained(again.data, again.datasets, multiple_of=8, most=4).samples} == set(keys)
    assert len(some_trained(again.data, again.datasets, multiple_of=8, most=100).samples) == 6


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_measures_all_of_it_and_resumes(
    train: Train,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--validation_dir", str(folders["validation"]), f"b={folders['validation'].parent / 'b'}")
    (tmp_path / "b").mkdir()
    image = sorted((IMAGES / "validation").glob("*.png"))[5]
    for file in (image, image.with_suffix(".txt")):
        shutil.copy(file, tmp_path / "b")
    words += ("--forgetting_dir", f"noto={folders['report']}", "--validation_gap", "--validate_every_n_steps", "1")
    words += ("--max_train_steps", "2", "--learning_rate", "3e-2", "--network_train_unet_only")
    assert train(*words) == 0
    messages = capsys.readouterr().err
    losses = noted(tmp_path, "validation")
    assert [step for step, _ in losses] == [0, 1, 2]  # of the first folder, as nothing is held out
    sets, gaps, forgotten = (noted(tmp_path, kind) for kind in ("validation_sets", "gap", "forgetting"))
    assert [step for step, _ in sets] == [step for step, _ in gaps] == [step for step, _ in forgotten] == [0, 1, 2]
    assert [list(own) for _, own in sets] == [["b"]] * 3
    for (_, loss), (_, gap) in zip(losses, gaps, strict=True):
        assert gap["gap"] == pytest.approx((loss["loss"] - gap["trained"]) / gap["trained"], rel=1e-4)
        assert gap["t500"] > -1
    assert forgotten[0][1]["noto"]["rate"] == 0
    for _, own in forgotten:
        one = own["noto"]
        assert one["rate"] == pytest.approx((one["loss"] - one["base"]) / one["base"], abs=1e-5)
    assert len({own["noto"]["base"] for _, own in forgotten}) == 1
    assert f"forgetting of noto after 2 steps: {100 * forgotten[2][1]['noto']['rate']:+.1f} %" in messages
    assert f"gap after 2 steps: {100 * gaps[2][1]['gap']:+.1f} % ({100 * gaps[0][1]['gap']:+.1f} % before" in messages
    assert (tmp_path / "out" / "test-best.safetensors").is_file()

    # the same without: training does not notice
    assert train("--output_name", "plain", *words[-5:]) == 0
    assert same(weights(tmp_path, "plain"), weights(tmp_path))

    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert train(*words, "--output_name", "broken") == 130
    assert train(*words, "--output_name", "broken", "--resume", "latest") == 0
    for kind in ("validation", "validation_sets", "gap", "forgetting"):
        assert noted(tmp_path, kind, "broken") == noted(tmp_path, kind)


@pytest.mark.slow
def test_the_loss_is_that_of_evaluate(train: Train, folders: dict[str, Path], tmp_path: Path) -> None:
    """The command that measures files afterwards finds the same losses, of the base and of the network."""
    import csv

    from library.evaluation.evaluate import main as evaluate

    words = ("--forgetting_dir", f"noto={folders['report']}", "--max_train_steps", "2", "--learning_rate", "3e-2")
    assert train(*words) == 0
    assert (
        evaluate(
            [
                *(str(tmp_path / "out" / "test.safetensors"), "--pretrained_model_name_or_path", str(BASE)),
                *("--images", f"noto={folders['report']}", "--resolution", "64", "--seed", "1", "--batch_size", "2"),
                *("--output_dir", str(tmp_path / "judged")),
            ]
        )
        == 0
    )
    with (tmp_path / "judged" / "evaluation.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    step, own = noted(tmp_path, "forgetting")[-1]
    assert step == 2
    assert own["noto"]["loss"] == pytest.approx(float(rows[0]["loss"]), rel=1e-5)
    assert own["noto"]["base"] == pytest.approx(float(rows[0]["base"]), rel=1e-5)
    assert [own["noto"][f"t{t}"] for t in (100, 300, 500, 700, 900)] == pytest.approx(
        [float(row["percent"]) / 100 for row in rows[1:]], abs=1e-4
    )


def test_a_gap_needs_images_held_out(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--validation_gap") == 2
    assert "--validation_gap needs images to validate on" in capsys.readouterr().err
