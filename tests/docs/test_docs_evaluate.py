"""What docs/evaluate.md tells a user to type works, and its pictures are what these commands draw."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import command_pictures
from tests.conftest import IMAGES, ROOT, forget_accelerator

PAGE = command_pictures.text_of("evaluate")
# one image, one step, one rank: the tests of tests/evaluation look at what comes out
SHORT = {
    "train_network.py": ["--max_train_epochs", "0", "--max_train_steps", "1", "--compare_prompts=", "--no-loss_plot"],
    "evaluate": ["--batch_size", "1"],
    "draw": [],
    "cross_validate": ["--max_train_epochs", "0", "--max_train_steps", "1", "--max_validation_steps", "1"],
    "find_rank": ["--max_train_epochs", "0", "--max_train_steps", "1", "--max_validation_steps", "1"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's commands run: the quickstart with few images."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "quickstart").mkdir()
    (folder / "quickstart" / "base").symlink_to(ROOT / "quickstart" / "base")
    for name, count in (("train", 8), ("validation", 2)):
        (folder / "quickstart" / "images" / name).mkdir(parents=True)
        for image in sorted((IMAGES / name).glob("*.png"))[:count]:
            for path in (image, image.with_suffix(".txt")):
                shutil.copy(path, folder / "quickstart" / "images" / name)
    command_pictures.write_files(folder)
    return folder


def short(words: list[str]) -> Iterator[str]:
    """The command with fewer ranks, prompts and steps of denoising."""
    for word in words:
        yield "1,2" if re.fullmatch(r"\d+(,\d+){2,}", word) else word


def test_every_command_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.evaluation import sweep
    from networks.tools.__main__ import main as tools
    from train_network import main as train

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sweep, "_run", lambda command: forget_accelerator() or train(list(command[2:])))
    prompts = folder / "prompts.txt"
    prompts.write_text(prompts.read_text().replace("--s 25", "--s 1"))
    seen = set()
    for command in command_pictures.commands("evaluate"):
        words = list(short(command))
        name = "train_network.py" if words[1] == "train_network.py" else words[3]
        seen.add(name)
        forget_accelerator()
        if name == "train_network.py":
            assert train([*words[2:], *SHORT[name]]) == 0
        else:
            assert tools([*words[3:], *SHORT[name]]) == 0
    assert seen == SHORT.keys()
    for picture in command_pictures.PICTURES["evaluate"].values():
        assert (folder / picture).is_file()


def test_its_pictures_are_there() -> None:
    shown = re.findall(r"\(images/(.*?)\)", PAGE)
    assert shown == list(command_pictures.PICTURES["evaluate"])
    assert all((ROOT / "docs" / "images" / name).is_file() for name in shown)


def test_every_option_of_the_page_exists() -> None:
    from library.config.fields import declared
    from library.config.options import declared_options
    from library.evaluation import cross_validate, draw, evaluate, find_rank

    groups = [
        group for module in (cross_validate, draw, evaluate, find_rank) for group in module.COMMAND.groups.values()
    ]
    known = {"help"} | {name for group in groups for name in declared(group)} | declared_options().keys()
    named = {name.removeprefix("no-") for name in re.findall(r"`--([\w-]{3,})", PAGE)}  # shorter: flags of prompts
    assert named <= known


def test_commands_are_written_as_a_user_types_them() -> None:
    for words in command_pictures.commands("evaluate"):
        assert shlex.join(words).startswith(("python train_network.py ", "python -m networks.tools "))
