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
from library.training import sample, save
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
    assert said.count("Training goes on") == (1 if stopped else 2)
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
