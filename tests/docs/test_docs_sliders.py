"""What docs/sliders.md tells a user to type works, and its tables have every key."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.config.data import slider_prompts
from library.config.data.slider_prompts import read_settings
from library.config.options import declared_options
from library.config.options.slider import SliderOptions
from library.run.slider import in_words
from library.sampling.prompts import read_prompts
from tests.conftest import ROOT, forget_accelerator
from tests.docs.tables import commands, page

PAGE = page("sliders")
COMMANDS = commands(PAGE)
SHORT = (
    "--max_train_steps",
    "2",
    "--max_denoising_steps",
    "3",
    "--compare_steps",
    "1",
    "--no-report",
    "--no-loss_plot",
)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working directory, with the files that the page names."""
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "configs"):
        Path(name).symlink_to(ROOT / name)
    for block in re.findall(r"```(?:toml|text)\n(.*?)```", PAGE, flags=re.DOTALL):
        if block.startswith("# "):
            Path(block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    return tmp_path


def test_the_commands_train_what_the_page_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for (_, program, *words), name in zip(COMMANDS, ("quickstart-slider", "no-red"), strict=True):
        assert importlib.import_module(program.removesuffix(".py")).main([*words, *SHORT]) == 0
        forget_accelerator()
        assert all(key.startswith("lora_unet_") for key in load_file(f"output/{name}.safetensors"))
        assert Path(f"output/{name}-slider.png").exists()
    said = " ".join(capsys.readouterr().err.split())
    (formula,) = re.findall(r"```text\n('emoji.*?)\n```", PAGE, flags=re.DOTALL)
    assert formula in said


def test_the_files_of_the_page_are_those_that_it_says(folder: Path) -> None:
    assert read_settings(Path("hearts.toml")) == read_settings(Path("configs/quickstart_slider_prompts.toml"))
    (formula,) = in_words(read_settings(Path("erase.toml")))
    assert f"{formula}\n" in PAGE
    assert [prompt.multiplier for prompt in read_prompts(Path("samples.txt"))] == [-2, 2]


def test_every_key_and_option_is_named() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE))
    keys = {*slider_prompts._OF_AXIS, *slider_prompts._OF_PROMPT} - {"neutral_prompt_file"}
    assert keys <= named
    options = {name.removeprefix("no-") for name in re.findall(r"`--([\w-]+)", PAGE)}
    assert options <= declared_options().keys() | {"am", "d", "multipliers"}
    assert {field.name for field in dataclasses.fields(SliderOptions)} <= options
