"""What docs/chroma.md tells a user to type works, on the tiny Chroma, and its names and numbers are the program's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from library.config import kohya
from library.config.options import declared_options
from tests import tiny_chroma as tiny
from tests.docs.tables import commands, options_named, page, train_as_told

PAGE = page("chroma")
COMMANDS = [words[1:] for words in commands(PAGE)]


@pytest.mark.slow  # as that of FLUX.1, which is quick
@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_every_command_trains(command: list[str], tiny_chroma: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    train_as_told(command, tiny.single_files(tiny_chroma, tmp_path / "models"))


def test_the_options_that_are_named_exist() -> None:
    assert COMMANDS
    flags_of_prompts_and_tools = {"l", "n", "only", "cached_text"}
    assert options_named(PAGE) - flags_of_prompts_and_tools <= declared_options().keys() | kohya.rows().keys()


def test_the_sizes_of_the_files() -> None:
    """Of rank 16 in bf16: the layers one by one, fused with zeros beside the blocks, and as kohya has them. And of a
    caption of 60 tokens with the end and one of padding."""
    width, mlp, double, single = 3072, 12288, 19, 38
    shared = double * 2 * (4 * width + 2 * width + 2 * (width + mlp)) + single * (
        (width + 7 * width) + (width + mlp + width)
    )
    leaves = shared + double * 2 * 2 * width + single * 3 * width
    fused = leaves + double * 2 * (9 - 3) * width + single * (4 * 7 - 7) * width
    assert shared == 3_502_080
    for numbers, said in ((shared, "has 112"), (leaves, "131 MB"), (fused, "has 232 MB")):
        assert re.search(rf"\b{round(numbers * 16 * 2 / 1e6)}\b", said), numbers * 32 / 1e6
        assert said in re.sub(r"\s+", " ", PAGE)
    assert f"{round(leaves * 16 / 1e6)} million numbers" in PAGE
    assert f"takes {62 * (4096 * 2 + 8) / 1e6:.2f} MB in bf16" in PAGE
