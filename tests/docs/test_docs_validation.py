"""What docs/validation.md tells a user to type works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
COMMANDS = [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[4:]))
def test_every_command_validates(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from train_network import main

    monkeypatch.chdir(tmp_path)
    for name in ("configs", "quickstart"):
        Path(name).symlink_to(ROOT / name)
    for block in re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL):
        Path(block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    _, _, *words = shlex.split(command)
    short = ["--max_train_epochs", "0", "--max_train_steps", "1", "--compare_prompts", "", "--no-loss_plot"]
    assert main([*words, *short, "--max_validation_steps", "1"]) == 0
    assert sorted(path.name for path in Path("output").glob("*.safetensors")) == [
        "quickstart-best.safetensors",
        "quickstart.safetensors",
    ]


def test_every_option_of_the_page_exists() -> None:
    from library.config.options import declared_options

    named = set(re.findall(r"`--(\w+)", PAGE))
    assert named <= declared_options().keys()
    assert {name for name in declared_options() if name.startswith(("validat", "early", "ema"))} <= named | {"ema_for"}
