"""What docs/tools.md tells a user to type works, and prints what the page shows but for its numbers."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

from benchmarks import merge_methods
from docs import command_pictures
from networks.tools.__main__ import COMMANDS
from networks.tools.__main__ import main as tools
from tests.conftest import IMAGES, ROOT, forget_accelerator
from train_network import main as train

PAGE = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(sh|text)\n(.*?)```", PAGE, flags=re.DOTALL)
SHORT = ["--compare_prompts=", "--no-loss_plot"]
ELSEWHERE = ("evaluate", "draw", "cross_validate", "find_rank", "tasks")  # docs/evaluate.md, docs/forgetting.md
DOORS = (
    *("resize_lora", "merge_lora", "svd_merge_lora", "extract_lora_from_models", "check_lora_weights"),
    "lora_interrogator",
)


def words_of(block: str) -> list[list[str]]:
    """The words of each command of a block."""
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's commands run: the quickstart with few images."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "quickstart" / "images").mkdir(parents=True)
    (folder / "quickstart" / "base").symlink_to(ROOT / "quickstart" / "base")
    for name in ("train", "validation"):
        (folder / "quickstart" / "images" / name).mkdir()
        for image in sorted((IMAGES / name).glob("*.png"))[:8]:
            for path in (image, image.with_suffix(".txt")):
                shutil.copy(path, folder / "quickstart" / "images" / name)
    return folder


def run(words: list[str]) -> int:
    """A command of the page, in this process."""
    assert words[0] == "python"
    if words[1] == "train_network.py":
        forget_accelerator()
        return train([*words[2:], *SHORT])
    if words[1].startswith("networks/"):
        module = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        code: int = module.main(words[2:])
        return code
    assert words[1:3] == ["-m", "networks.tools"]
    return tools(words[3:])


def outline(text: str) -> set[str]:
    """Its lines without their numbers and spaces."""
    return {re.sub(r"\s+", "", re.sub(r"-?\d[\d.]*", "#", line)) for line in text.splitlines() if line.strip(" …")}


def test_every_command_works(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And writes the files that it names, and prints the lines that the page shows."""
    monkeypatch.chdir(folder)
    printed, seen = "", set()
    for kind, block in BLOCKS:
        if kind == "text":
            assert outline(block) <= outline(printed), block
            continue
        capsys.readouterr()
        for words in words_of(block):
            assert run(words) == 0, shlex.join(words)
            seen.add(words[3] if words[1] == "-m" else Path(words[1]).stem)
            named = [word for word in words if word.startswith("output/")]
            assert all((folder / name).exists() for name in named)
        printed = "".join(capsys.readouterr())
    assert seen == {*COMMANDS.keys() - set(ELSEWHERE), *DOORS, "train_network"}


def test_every_sub_command_is_described() -> None:
    rows = re.findall(r"^\| (.*?) \|", PAGE, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert COMMANDS.keys() <= named


def test_every_option_of_the_page_exists() -> None:
    known = {"--help", "--config_file", "--sd_model", "--lbws", "--as_kohya", "--concat"}
    known |= {"--kohya", "--seeds"}  # of the benchmarks
    for name in COMMANDS.keys() - set(ELSEWHERE):
        known |= {f"--{option}" for option in importlib.import_module(COMMANDS[name][0]).COMMAND.options()}
    text = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    named = {name for words in re.findall(r"`([^`\n]*)`", text) for name in re.findall(r"--\w+", words)}
    assert named <= known


def test_its_pictures_are_there() -> None:
    pictures = command_pictures.PICTURES["tools"]
    shown = re.findall(r"\(images/(.*?)\)", PAGE)
    assert set(shown) == {*pictures, merge_methods.PICTURE.name}
    assert all((ROOT / "docs" / "images" / name).is_file() for name in shown)
    assert set(pictures.values()) <= {word for words in command_pictures.commands("tools") for word in words}
