"""Wrong inputs, each with its exact message and exit code 2, before any model is loaded where none is needed."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from library.models.components import Components
from tests.bad_input import wrong_files, wrong_settings
from tests.bad_input.wrong import IMAGES, USUAL, Wrong, good_inputs, write
from train_network import main

KINDS = {
    "config": wrong_settings.CONFIG,
    "flags": wrong_settings.FLAGS,
    "paths": wrong_settings.PATHS,
    "data sets": wrong_settings.DATASETS,
    "images": wrong_files.IMAGE,
    "captions": wrong_files.CAPTION,
    "models": wrong_files.MODEL,
    "LoRA files": wrong_files.LORA,
    "states": wrong_files.STATE,
}
ROWS = {f"{kind}: {row.name}": row for kind, rows in KINDS.items() for row in rows}


def _messages() -> dict[str, str]:
    """By row. In the file a blank line ends each, and => stands between name and message."""
    blocks = (Path(__file__).parent / "messages.txt").read_text(encoding="utf-8").strip().split("\n\n")
    return {name: message for name, _, message in (block.partition("\n=>\n") for block in blocks)}


MESSAGES = _messages()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with lora.safetensors and fox-state of two steps on the images that every test has."""
    folder, before = tmp_path_factory.mktemp("trained"), Path.cwd()
    os.chdir(folder)
    try:
        good_inputs()
        words = ("--output_name", "fox", "--max_train_steps", "2", "--save_state_on_train_end")
        assert main([*USUAL, *words]) == 0
    finally:
        os.chdir(before)
    return folder / "out"


@pytest.fixture
def here(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which all good inputs lie."""
    monkeypatch.chdir(tmp_path)
    good_inputs()
    shutil.copy(trained / "fox.safetensors", "lora.safetensors")
    shutil.copytree(trained / "fox-state", "fox-state")
    return tmp_path


def _no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_arguments: object, **_more: object) -> None:
        pytest.fail("a model is loaded")

    monkeypatch.setattr(Components, "load", load)


def _written() -> list[Path]:
    return [path for path in Path("out").rglob("*") if path.is_file()]


def _refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """What the error says after "error: "."""
    capsys.readouterr()
    assert main([*USUAL, *words]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert "error: " in printed
    assert _written() == []
    return printed.partition("error: ")[2].rstrip("\n")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ROWS)
def test_wrong_input(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = ROWS[name]
    if not row.needs_model:
        _no_models(monkeypatch)
    row.prepare()
    assert _refused(row.words, capsys) == MESSAGES[name]


def test_there_are_enough_of_each_kind() -> None:
    assert all(len({row.name for row in rows}) == len(rows) >= 5 for rows in KINDS.values())
    assert MESSAGES.keys() == ROWS.keys() | LOCKED_ROWS.keys()


@pytest.mark.usefixtures("here")
def test_what_they_are_changed_from_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anything wrong the models are loaded, or the rows would prove nothing."""
    _no_models(monkeypatch)
    for words in (
        ("--network_weights", "lora.safetensors", "--base_weights", "lora.safetensors", "--vae", "base/vae"),
        ("--resume", "fox-state", "--max_train_steps", "6", "--in_json", "m.json", "--train_data_dir", str(IMAGES)),
    ):
        write("m.json", '{"a.png": {"caption": "a"}}')
        with pytest.raises(pytest.fail.Exception, match="a model is loaded"):
            main([*USUAL, *words, "--resume_anyway", "--overwrite"])  # the record of one that has not ended


# -- rights


def locked(path: str, *words: str) -> Wrong:
    return Wrong(path, words, lambda: Path(path).chmod(0))


def _locked_output() -> None:
    Path("out").mkdir()
    Path("out").chmod(0o555)


LOCKED = [
    Wrong(
        "no config file may be read",
        ("--config_file", "t.toml"),
        lambda: (write("t.toml", ""), Path("t.toml").chmod(0)),
    ),
    locked("data"),
    locked("data/2_style"),
    locked("data/2_style/a.png"),
    locked("data/2_style/a.txt"),
    locked("fox-state", "--resume", "fox-state", "--max_train_steps", "6"),
    locked("fox-state/state.json", "--resume", "fox-state", "--max_train_steps", "6"),
    locked("fox-state/state.pt", "--resume", "fox-state", "--max_train_steps", "6"),
    locked("lora.safetensors", "--network_weights", "lora.safetensors"),
    Wrong("a model in a locked folder", ("--pretrained_model_name_or_path", "m/x.ckpt"), lambda: Path("m").mkdir(0)),
    Wrong("the output folder", (), _locked_output),
]
LOCKED_ROWS = {f"rights: {row.name}": row for row in LOCKED}


def _without_roots_rights(act: Callable[[], None]) -> None:
    """Run this in a thread that may do no more than the owner of each file. Rights are a thread's own on Linux."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            if os.geteuid() == 0:
                version = (ctypes.c_uint32 * 2)(0x20080522, 0)  # of linux/capability.h; of this thread
                none = (ctypes.c_uint32 * 6)()
                assert ctypes.CDLL(None, use_errno=True).capset(version, none) == 0
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@pytest.mark.skipif(sys.platform != "linux", reason="rights of Linux")
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", LOCKED_ROWS)
def test_what_may_not_be_read_or_written(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    row = LOCKED_ROWS[name]
    _no_models(monkeypatch)
    row.prepare()
    said: list[str] = []
    try:
        _without_roots_rights(lambda: said.append(_refused(row.words, capsys)))
    finally:
        for path in (tmp_path, *tmp_path.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755)
    assert said == [MESSAGES[name]]
