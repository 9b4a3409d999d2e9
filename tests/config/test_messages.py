"""The exact messages for the commonest mistakes: place, value, nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.config.parser import parse
from library.errors import UserError

DATA = Path(__file__).parent / "data"
REQUIRED = ["--pretrained_model_name_or_path", "base.safetensors", "--output_dir", "out"]


def snapshots(name: str) -> dict[str, str]:
    """Inputs to messages. In the file a blank line ends each pair, and => stands between its halves."""
    blocks = (DATA / name).read_text(encoding="utf-8").strip().split("\n\n")
    halves = [block.partition("\n=>\n") for block in blocks if not block.startswith("# ")]
    return {given: message for given, _, message in halves}


COMMAND_LINES = snapshots("messages_command_line.txt")
FILES = snapshots("messages_file.txt")


def message(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        parse([*REQUIRED, *words])
    return str(caught.value)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("words", COMMAND_LINES)
def test_command_line(words: str) -> None:
    assert message(*words.split()) == COMMAND_LINES[words]


@pytest.mark.parametrize("text", FILES)
def test_file(text: str, folder: Path) -> None:
    (folder / "train.toml").write_text(f"{text}\n", encoding="utf-8")
    assert message("--config_file", "train.toml") == FILES[text]


def test_every_mistake_is_named_at_once(folder: Path) -> None:
    (folder / "train.toml").write_text("[a]\nnetwork_dim = 'x'\nfused_backward_pass = 1\n", encoding="utf-8")
    assert message("--config_file", "train", "--seed", "y", "--foo") == (
        "train.toml: [a] network_dim: 'x' is not a whole number\n"
        "command line: --seed: 'y' is not a whole number\n"
        "train.toml: [a] fused_backward_pass = 1: known to kohya's scripts, not supported here yet\n"
        "command line: --foo: unknown option"
    )


def test_a_word_before_any_option() -> None:
    with pytest.raises(UserError, match=r"^command line: unexpected word 'train.toml': options begin with --$"):
        parse(["train.toml"])


def test_what_is_required() -> None:
    with pytest.raises(UserError) as caught:
        parse(["--seed", "1"])
    assert [line.split(" is required")[0] for line in str(caught.value).splitlines()] == [
        "--pretrained_model_name_or_path",
        "--output_dir",
    ]


def test_a_file_that_is_no_text(folder: Path) -> None:
    (folder / "train.toml").write_bytes("vae = 'モデル'".encode("shift_jis"))
    assert message("--config_file", "train.toml").startswith("train.toml: not a text file in UTF-8: ")
