"""What docs/z-image.md tells a user to type works, on the tiny Z-Image, and its names and numbers are the program's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.config import kohya
from library.config.options import declared_options
from tests import tiny_z_image as tiny
from tests.docs.tables import commands, options_named, page, train_as_told

PAGE = page("z-image")
COMMANDS = [words[1:] for words in commands(PAGE)]


@pytest.mark.parametrize(
    "command", [COMMANDS[0], pytest.param(COMMANDS[1], marks=pytest.mark.slow)], ids=["base", "turbo"]
)
def test_every_command_trains(command: list[str], tiny_z_image: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pair = {"lora_A": (2, tiny.WIDTH), "lora_B": (tiny.WIDTH, 2)}
    layer = "diffusion_model.layers.0.attention.to_q"
    save_file({f"{layer}.{end}.weight": torch.ones(shape) for end, shape in pair.items()}, tmp_path / "a.safetensors")
    files = tiny.single_files(tiny_z_image, tmp_path / "models")
    train_as_told(command, {**files, "base_weights": tmp_path / "a.safetensors"})


def test_the_options_that_are_named_exist() -> None:
    assert len(COMMANDS) == 2
    flags_of_prompts_and_tools = {"to", "fs", "only", "cached_text"}
    assert options_named(PAGE) - flags_of_prompts_and_tools <= declared_options().keys() | kohya.rows().keys()


def test_the_sizes_of_the_files() -> None:
    """Of rank 16 in bf16, and of a caption of 60 tokens with the eight of the chat, three of them before it."""
    width, mlp, states, layers = 3840, 10240, 2560, 30
    per_rank = layers * (4 * 2 * width + 3 * (width + mlp))
    assert per_rank == 2_188_800
    assert f"{round(per_rank * 16 * 2 / 1e6)} MB for rank 16" in PAGE
    chat = 3 + 5
    assert f"takes {(60 + chat) * (states * 2 + 8) / 1e6:.2f} MB in bf16" in PAGE
