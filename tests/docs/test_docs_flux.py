"""What docs/flux.md tells a user to type works, on the tiny FLUX.1, and its names and numbers are the program's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from library.config.options import declared_options
from tests import tiny_flux as tiny
from tests.docs.tables import commands, options_named, page, train_as_told

PAGE = page("flux")
COMMANDS = [words[1:] for words in commands(PAGE)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_every_command_trains(command: list[str], tiny_flux: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    train_as_told(command, tiny.single_files(tiny_flux, tmp_path / "models"), "--t5xxl_max_token_length", "16")


def test_the_options_that_are_named_exist() -> None:
    assert COMMANDS
    flags_of_prompts_and_tools = {"to", "g", "fs", "l", "n", "only", "cached_text", "sd_scripts"}
    assert options_named(PAGE) - flags_of_prompts_and_tools <= declared_options().keys()


def test_the_sizes_of_the_files() -> None:
    """Of rank 16 in bf16: the layers one by one, fused with zeros beside the blocks, and as kohya has them."""
    width, mlp, double, single = 3072, 12288, 19, 38
    shared = double * 2 * (7 * width + 4 * width + 2 * width + 2 * (width + mlp))
    shared += single * ((width + 7 * width) + (width + mlp + width) + (width + 3 * width))
    leaves = shared + double * 2 * 2 * width + single * 3 * width
    fused = leaves + double * 2 * (9 - 3) * width + single * (4 * 7 - 7) * width
    assert (shared, leaves) == (4_786_176, 5_369_856)
    for numbers, said in ((shared, "has 153"), (leaves, "172 MB"), (fused, "has 273 MB")):
        assert re.search(rf"\b{round(numbers * 16 * 2 / 1e6)}\b", said), numbers * 32 / 1e6
        assert said in PAGE
    assert f"{round(leaves * 16 / 1e6)} million numbers" in PAGE
