"""What docs/flux2.md tells a user to type works, on the tiny FLUX.2 klein; its names and numbers are the program's."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from library.config import kohya
from library.config.options import declared_options
from library.config.options.flow import FlowOptions
from library.diffusion.flow import ResolutionShift, StepsShift
from tests import tiny_flux2 as tiny
from tests.docs.tables import commands, options_named, page, train_as_told

PAGE = page("flux2")
COMMANDS = [words[1:] for words in commands(PAGE)]
WIDTHS = {"4B": (5, 20, 3072, 2560), "9B": (8, 24, 4096, 4096)}  # double and single blocks, width, Qwen3's width


@pytest.mark.parametrize(
    "command", [COMMANDS[0], pytest.param(COMMANDS[1], marks=pytest.mark.slow)], ids=["files", "folder"]
)
def test_every_command_trains(command: list[str], tiny_flux2: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = tiny.single_files(tiny_flux2, tmp_path / "models")
    if "--qwen3" not in command:
        files = {"pretrained_model_name_or_path": shutil.copytree(tiny_flux2, tmp_path / "models" / "folder")}
    train_as_told(command, files, "--qwen3_max_token_length", "48")


def test_the_options_that_are_named_exist() -> None:
    assert len(COMMANDS) == 2
    flags_of_tools = {"only", "cached_text"}
    assert options_named(PAGE) - flags_of_tools <= declared_options().keys() | kohya.rows().keys()


def test_the_sizes_of_the_files() -> None:
    """Of rank 16 in bf16, in both namings, and of a cached caption."""
    kohyas, diffusers, captions = {}, {}, {}
    for name, (doubles, singles, width, states) in WIDTHS.items():
        apart = 2 * (4 * 2 + 7 + 4) * doubles + (10 + 5) * singles  # sums of a layer's sides, in widths
        together = apart + 2 * (3 * (1 + 3) - 3 * 2) * doubles
        kohyas[name], diffusers[name] = (round(count * width * 16 * 2 / 1e6) for count in (together, apart))
        captions[name] = f"{512 * 3 * states * 2 / 1e6:.1f} MB"
    assert f"rank 16 has {kohyas['4B']} MB in bf16 (9B: {kohyas['9B']} MB)" in PAGE
    assert f"of ComfyUI: {diffusers['4B']} MB (9B: {diffusers['9B']} MB)" in PAGE
    assert f"takes {captions['4B']} in bf16, of klein 9B {captions['9B']}" in PAGE
    (doubles, singles, *_), (more_doubles, more_singles, *_) = WIDTHS.values()
    assert f"counts {3 * doubles + singles} (9B: {3 * more_doubles + more_singles})" in PAGE
    assert f"have {doubles + singles} ({more_doubles + more_singles}) numbers" in PAGE


def test_the_shifts() -> None:
    drawn = [f"{ResolutionShift(patch=1).of((side, side)):.2f}" for side in (16, 32, 64)]
    assert "{} at 256 px, {} at 512, {} at 1024".format(*drawn) in PAGE
    of_samples = [f"{StepsShift().of((64, 64), steps):.1f}" for steps in (50, 4)]
    assert "by {} at 1024 px and 50 steps, {} at 4 steps".format(*of_samples) in PAGE
    assert math.isclose(StepsShift().of((64, 64)), StepsShift().of((64, 64), 50))


def test_the_defaults() -> None:
    assert FlowOptions().qwen3_max_token_length == 512
    assert "Always 512 tokens" in PAGE
