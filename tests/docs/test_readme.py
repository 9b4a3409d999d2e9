"""What README.md tells a user to type works. Names of things that a user would have stand for what ships here."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from library.config.parser import parse
from tests.conftest import BASE, IMAGES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def words_of(command: str) -> tuple[str, ...]:
    """What stands behind train_network.py, whoever launches it."""
    words = shlex.split(command.replace(" \\\n", " "), comments=True)
    return tuple(words[next(i for i, word in enumerate(words) if word.endswith("train_network.py")) + 1 :])


COMMANDS = list(
    dict.fromkeys(
        tuple(word for word in words_of(line) if word != "--overwrite")
        for block in blocks("sh")
        for line in re.split(r"(?<!\\)\n", block)
        if "train_network.py" in line
    )
)


def one(command: tuple[str, ...]) -> Any:
    """A command of `make test-full`."""
    return pytest.param(command, marks=pytest.mark.slow)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the examples name: the model, images, and their TOML files."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my_data/10_mycat", "photos", "drawings"):
        Path(folder).mkdir(parents=True)
        for image in sorted((IMAGES / "train").glob("*.png"))[:5]:
            shutil.copy(image, folder)
            shutil.copy(image.with_suffix(".txt"), folder)
    shutil.copytree(ROOT / "configs", "configs")
    Path("quickstart").symlink_to(ROOT / "quickstart")
    for block in blocks("toml"):
        name = block.splitlines()[0].removeprefix("# ")
        Path(name).write_text(block.replace("models/sd15.safetensors", str(BASE)), encoding="utf-8")
    return tmp_path


@pytest.fixture
def models(tiny_sdxl: Path) -> dict[str, str]:
    """What stands for the models that the examples name."""
    return {"models/sd15.safetensors": str(BASE), "models/sdxl.safetensors": str(tiny_sdxl)}


@pytest.mark.parametrize("command", [COMMANDS[0], *map(one, COMMANDS[1:])], ids=lambda command: " ".join(command[-6:]))
def test_every_command_trains(workplace, models, command):
    from train_network import main

    small = ["--max_train_epochs", "0", "--max_train_steps", "1", "--overwrite", "--no-enable_bucket"]
    size = ["--compare_steps", "2"] if "configs/quickstart.toml" in command else ["--resolution", "64"]
    words = [models.get(word, word) for word in command]
    if "--resume" in words:
        place = words.index("--resume")
        assert main([*words[:place], *words[place + 2 :], *small, *size]) == 0
        small = ["--max_train_epochs", "0", "--max_train_steps", "2"]
    assert main([*words, *small, *size]) == 0
    if not any(word.startswith("--dry_run") for word in command):
        assert list(Path("output").glob("*.safetensors"))


@pytest.mark.slow
def test_the_dataset_config_trains(workplace):
    from train_network import main

    config = Path("data.toml").read_text(encoding="utf-8").replace("512", "64").replace("enable_bucket = true", "")
    Path("data.toml").write_text(config, encoding="utf-8")
    words = ["--config_file", "mycat.toml", "--dataset_config", "data.toml", "--max_train_epochs", "1"]
    assert main(words) == 0


def test_output_config_writes_what_can_be_read(workplace):
    words = ["--pretrained_model_name_or_path", str(BASE), "--output_dir", "o", "--learning_rate", "3e-4"]
    with pytest.raises(SystemExit) as stop:
        parse([*words, "--output_config", "--config_file", "new.toml"])
    assert stop.value.code == 0
    assert parse(["--config_file", "new.toml"]).optimizer.learning_rate == 3e-4


def test_there_are_commands_to_test():
    assert len(COMMANDS) >= 5
    assert {block.splitlines()[0] for block in blocks("toml")} == {"# mycat.toml", "# data.toml"}
