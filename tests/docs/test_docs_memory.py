"""What docs/memory.md tells a user to type works, and its figures are the program's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from library.config.options import declared_options
from library.guidance import levers
from library.guidance import memory as formulas
from library.guidance.card import MARGIN
from tests.conftest import BASE, ROOT, copy_images

PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:] for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
CONFIG = f"""
pretrained_model_name_or_path = '{BASE}'
train_data_dir = 'my_data'
caption_extension = '.txt'
output_dir = 'out'
resolution = '64'
learning_rate = 1e-4
max_train_steps = 1
seed = 1
loss_plot = false
report = false
"""


@pytest.mark.parametrize("command", [words for words in COMMANDS if words[0].endswith(".py")], ids=" ".join)
def test_every_command_of_training(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_network import main

    monkeypatch.chdir(tmp_path)
    copy_images(tmp_path / "my_data" / "1_mycat", 2)
    Path("mycat.toml").write_text(CONFIG, encoding="utf-8")
    without_a_gpu = command[-1] == "auto"
    assert main(command[1:]) == (2 if without_a_gpu else 0)
    said = capsys.readouterr()
    assert ("give a size, such as --fit 8GB" in said.err) == without_a_gpu
    assert ("it fits, with" in said.out) == ("--dry_run" in command)


def test_the_command_of_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = (words for words in COMMANDS if words[0] == "-m")
    assert command[1] == formulas.__name__
    assert formulas.main(command[2:]) == 0
    assert "QLoRA" in capsys.readouterr().out


def test_the_options_that_are_named_exist() -> None:
    named = set(re.findall(r"--(\w+)", PAGE)) - {"parameters", "rank", "checkpointing", "only"}
    assert named <= declared_options().keys()


def test_the_factors_are_those_of_the_cost_model() -> None:
    rows = {
        tuple(re.findall(r"`([^`]+)`", cells[1])): [float(number) for number in re.findall(r"\d\.\d\d", cells[3])]
        for line in PAGE.splitlines()
        if len(cells := line.split("|")) == 6 and re.search(r"\d\.\d\d", cells[3])
    }
    formats = {f"--base_format {name}": time for name, time, _ in levers._FORMATS}
    for words, times in rows.items():
        for word in words:
            if word in formats:
                assert times == [formats[word]]
    assert f"{MARGIN:.0%}".replace("%", " %") in PAGE
