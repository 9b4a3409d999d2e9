"""What docs/sdxl.md tells a user to type works, on the tiny SDXL, and its names are the program's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from library.config.options import declared_options
from tests.conftest import copy_images
from tests.docs.tables import commands, page

PAGE = page("sdxl")
COMMANDS = [words[1:] for words in commands(PAGE)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_every_command_trains(command: list[str], tiny_sdxl: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    copy_images(tmp_path / "my_data" / "10_mycat", 2)
    main = __import__(command[0].removesuffix(".py")).main
    words = [str(tiny_sdxl) if word == "models/sdxl.safetensors" else word for word in command[1:]]
    small = ["--max_train_epochs", "0", "--max_train_steps", "1", "--no-enable_bucket", "--resolution", "64"]
    assert main([*words, *small]) == 0
    assert list(tmp_path.rglob("*.safetensors"))


def test_the_options_that_are_named_exist() -> None:
    assert COMMANDS
    named = set(re.findall(r"--(?:no-)?(\w+)", PAGE)) - {"to"}
    assert named <= declared_options().keys()
