"""What the pages of the families that are trained by flow matching tell a user to type works, on their tiny models. The
numbers of each page are tested in test_docs_NAME.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.config import kohya
from library.config.options import declared_options
from tests import tiny_z_image
from tests.docs.tables import commands, options_named, page, train_as_told
from tests.flow_families import ROWS, FlowFamily

COMMANDS = [(family, words[1:]) for family in ROWS for words in commands(page(family.page))]
ELSEWHERE = {"to", "g", "fs", "l", "n", "only", "cached_text", "sd_scripts"}
"""Flags of prompts and of tools."""


@pytest.fixture
def files(family: FlowFamily, command: list[str], request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    """What stands for the files that the command names, by the options that name them."""
    folder: Path = request.getfixturevalue(family.fixture)
    found: dict[str, Path] = family.tiny.single_files(folder, tmp_path / "models")
    if not found.keys() & {word.removeprefix("--") for word in command} - {"pretrained_model_name_or_path"}:
        found = {"pretrained_model_name_or_path": shutil.copytree(folder, tmp_path / "models" / "folder")}
    if "--base_weights" in command:
        pair = {"lora_A": (2, tiny_z_image.WIDTH), "lora_B": (tiny_z_image.WIDTH, 2)}
        layer = "diffusion_model.layers.0.attention.to_q"
        found["base_weights"] = tmp_path / "adapter.safetensors"
        tensors = {f"{layer}.{end}.weight": torch.ones(shape) for end, shape in pair.items()}
        save_file(tensors, found["base_weights"])
    return found


@pytest.mark.parametrize(
    ("family", "command"), COMMANDS, ids=[f"{family}-{i}" for i, (family, _) in enumerate(COMMANDS)]
)
def test_every_command_trains(
    family: FlowFamily, command: list[str], files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # a page may take the VAE from the model's own file, where the tiny model has none
    beside = ("--vae", str(files["vae"])) if "vae" in files and "--vae" not in command else ()
    train_as_told(command, files, *beside, *family.short())


@pytest.mark.parametrize("family", ROWS, ids=str)
def test_the_options_that_are_named_exist(family: FlowFamily) -> None:
    text = page(family.page)
    assert len(commands(text)) == family.commands
    assert options_named(text) - ELSEWHERE <= declared_options().keys() | kohya.rows().keys()
