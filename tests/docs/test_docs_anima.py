"""What docs/anima.md tells a user to type works, on the tiny Anima, and its names and numbers are the program's."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.config import kohya
from library.config.options import declared_options
from tests import tiny_anima as tiny
from tests.docs.tables import commands, options_named, page, train_as_told

PAGE = page("anima")
COMMANDS = [words[1:] for words in commands(PAGE)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_every_command_trains(command: list[str], tiny_anima: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    train_as_told(command, tiny.single_files(tiny_anima, tmp_path / "models"))


def test_the_options_that_are_named_exist() -> None:
    assert COMMANDS
    flags_of_prompts_and_tools = {"to", "g", "fs", "l", "n", "only", "cached_text", "sd_scripts"}
    assert options_named(PAGE) - flags_of_prompts_and_tools <= declared_options().keys() | kohya.rows().keys()


def test_the_sizes_of_the_files() -> None:
    """Of rank 16 in bf16, and of a caption of 60 tokens."""
    width, mlp, states, blocks = 2048, 8192, 1024, 28
    block = 4 * 2 * width + (2 * 2 * width + 2 * (states + width)) + 2 * (width + mlp)
    assert blocks * block == 1_433_600
    assert f"{round(blocks * block * 16 * 2 / 1e6)} MB for rank 16" in PAGE
    assert f"takes {60 * states * 2 / 1e6:.2f} MB in bf16" in PAGE
