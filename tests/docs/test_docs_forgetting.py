"""What docs/forgetting.md tells a user to type works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from library.config.fields import declared
from library.config.options import declared_options
from library.config.options.forgetting import ForgettingOptions
from library.evaluation.tasks import TasksOptions
from tests.conftest import ROOT, forget_accelerator

PAGE = (ROOT / "docs" / "forgetting.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
SHORT = ["--max_train_epochs", "0", "--max_train_steps", "1", "--compare_prompts=", "--no-loss_plot", "--no-report"]
SHORT += ["--max_validation_steps", "1", "--overwrite"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page's commands name; the current one."""
    for name in ("benchmarks", "configs", "quickstart", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block, encoding="utf-8")
        if name.startswith("flat"):  # "the same for another style"
            other = block.replace("quickstart/images/train", "benchmarks/data/twemoji/train").replace("flat", "twemoji")
            (tmp_path / name.replace("flat", "twemoji")).write_text(other, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split(" --")[-1].strip()[:40])
def test_every_command_works(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from networks.tools.__main__ import main as tools
    from train_network import main as train

    def here(command: list[str]) -> int:
        forget_accelerator()
        return train(list(command[2:]))

    monkeypatch.setattr("library.evaluation.sweep._run", here)
    for _, *words in lines(block):
        forget_accelerator()
        if words[0] == "train_network.py":
            assert train([*words[1:], *SHORT]) == 0
        else:
            assert tools([*words[2:], "--", *SHORT[:-1]]) == 0


def test_the_commands_are_read(folder: Path) -> None:
    """The quick part of the test above: every command's words are options, and its data can be described."""
    from library.config import parser
    from library.config.data import dataset_config

    for block in BLOCKS:
        for _, *words in lines(block):
            if words[0] == "train_network.py":
                dataset_config.load_datasets(parser.parse([*words[1:], "--overwrite"]))


def test_every_option_is_named() -> None:
    named = set(re.findall(r"--(\w+)", PAGE))
    assert set(declared(ForgettingOptions)) <= named
    assert set(declared(TasksOptions)) <= named
    tools = {*declared(TasksOptions)}
    assert named - tools <= declared_options().keys()
