"""What a run leaves where a file cannot be written: nothing that was trained is lost."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from library.errors import UserError
from library.record import metadata
from library.record import saves as save
from library.sampling import render as sample
from tests.training.test_resume import stop_after

Train = Callable[..., int]


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network can be written into `out`; there is room for temporary files."""
    write = save.save_network

    def save_network(network: Any, path: Path, **settings: Any) -> None:
        if path.parent == tmp_path / "out":
            raise UserError(f"{path}: not written: the disk is full")
        write(network, path, **settings)

    monkeypatch.setattr(save, "save_network", save_network)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.mark.parametrize("stopped", [False, True], ids=["at its end", "by Ctrl-C"])
@pytest.mark.usefixtures("full")
def test_the_last_file_goes_where_there_is_room(
    stopped: bool, train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if stopped:
        stop_after(monkeypatch, 3)
    assert train("--save_every_n_steps", "2") == 2
    said = capsys.readouterr().err
    assert said.count("Training continues") == (1 if stopped else 2)
    found = re.search(r"error: .*not written: the disk is full\. The network is in (\S+) instead: move it", said)
    assert found is not None, said
    with safe_open(found[1], framework="pt") as file:
        assert file.metadata()["ss_steps"] == ("3" if stopped else "4")


def test_samples_that_cannot_be_written_cost_no_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextlib.contextmanager
    def replacing(path: Path) -> Iterator[Path]:
        raise UserError(f"{path}: not written: the disk is full")
        yield path

    monkeypatch.setattr(sample, "replacing", replacing)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1\n")
    words = ("--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2")
    assert train(*words, "--compare_prompts", "a dog", "--compare_steps", "1", "--max_train_steps", "3") == 0
    said = capsys.readouterr().err
    assert "_000002_00_" in said
    assert "test-compare.png: not written: the disk is full" in said
    assert (tmp_path / "out" / "test.safetensors").is_file()


def test_the_state_is_written_where_the_network_cannot_be(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save_network(_network: Any, path: Path, **_settings: Any) -> None:
        raise UserError(f"{path}: not written: some reason")

    monkeypatch.setattr(save, "save_network", save_network)
    assert train("--save_every_n_steps", "2", "--save_state", "--save_last_n_steps", "1", "--max_train_steps", "6") == 2
    said = capsys.readouterr().err
    assert said.count("Training continues") == 3
    assert said.count("error: ") == 4
    assert said.rstrip().endswith("test.safetensors: not written: some reason")
    # the states replace each other, although no network does
    assert sorted(path.name for path in (tmp_path / "out").glob("*state")) == ["test-state", "test-step00000006-state"]
    monkeypatch.undo()
    assert train("--resume", str(tmp_path / "out" / "test-state"), "--max_train_steps", "7", "--overwrite") == 0


@pytest.mark.parametrize("stopped", [False, True], ids=["at its end", "by Ctrl-C"])
def test_a_network_beyond_fp16_has_a_state(
    stopped: bool, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_finite(_file: Path, name: str, _precision: str | None) -> None:
        raise save.BrokenWeightsError(f"{name}: values beyond 65504", only_in_file=True)

    monkeypatch.setattr(save, "check_finite", check_finite)
    if stopped:
        stop_after(monkeypatch, 3)
    assert train("--save_state_on_train_end", "--save_precision", "fp16") == 2
    assert "values beyond 65504" in capsys.readouterr().err
    name = "test-step00000003-state" if stopped else "test-state"
    assert [path.name for path in (tmp_path / "out").glob("*state")] == [name]


def test_weights_that_are_no_numbers_are_in_no_state(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_finite(_file: Path, name: str, _precision: str | None) -> None:
        raise save.BrokenWeightsError(f"{name}: holds NaN")

    monkeypatch.setattr(save, "check_finite", check_finite)
    assert train("--save_state_on_train_end") == 2
    assert capsys.readouterr().err.count("holds NaN") == 1
    assert not list((tmp_path / "out").glob("*state"))


# -- metadata larger than a file's header may be


@pytest.mark.slow
def test_a_thumbnail_that_is_not_there_or_too_large_is_refused_before_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metadata, "MOST_METADATA", 3000)
    image = tmp_path / "thumbnail.png"
    image.write_bytes(bytes(3000))
    for value, said in (
        ("nowhere.png", "error: --metadata_thumbnail: nowhere.png is neither a file nor a data URL"),
        (str(image), "error: --metadata_thumbnail: 0 MB of metadata in a file; at most 0 MB"),
        ("data:image/png;base64," + "A" * 4000, "error: --metadata_thumbnail: 0 MB of metadata in a file"),
    ):
        assert train("--metadata_thumbnail", value, "--metadata_title", "x" * 100) == 2
        assert said in capsys.readouterr().err
    assert train("--training_comment", "狐" * 1500) == 2
    assert "error: --training_comment: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert train("--metadata_thumbnail", "nowhere.png", "--save_model_as", "ckpt", "--dry_run") == 0
