"""What docs/sdxl.md tells a user to type works, on the tiny SDXL, and its names are the program's."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from library.config.options import declared_options
from tests.conftest import IMAGES, ROOT

PAGE = (ROOT / "docs" / "sdxl.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_every_command_trains(command: list[str], tiny_sdxl: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my_data" / "10_mycat"
    folder.mkdir(parents=True)
    for image in sorted((IMAGES / "train").glob("*.png"))[:2]:
        shutil.copy(image, folder)
        shutil.copy(image.with_suffix(".txt"), folder)
    main = __import__(command[0].removesuffix(".py")).main
    words = [str(tiny_sdxl) if word == "models/sdxl.safetensors" else word for word in command[1:]]
    small = ["--max_train_epochs", "0", "--max_train_steps", "1", "--no-enable_bucket", "--resolution", "64"]
    assert main([*words, *small]) == 0
    assert list(tmp_path.rglob("*.safetensors"))


def test_the_options_that_are_named_exist() -> None:
    assert COMMANDS
    named = set(re.findall(r"--(?:no-)?(\w+)", PAGE)) - {"to"}
    assert named <= declared_options().keys()
