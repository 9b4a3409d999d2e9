"""Reads the tables and commands of a page of the documentation, for the tests that compare them with the program."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from tests.conftest import ROOT, copy_images


def page(name: str) -> str:
    """The text of docs/NAME.md."""
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The words of each command in the page's sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def tables(text: str) -> dict[str, list[list[str]]]:
    """The tables of a page by their first line, without bars: the cells of each row below the head."""
    found: dict[str, list[list[str]]] = {}
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        head, _, *rows = table.splitlines()
        key = " | ".join(_cells(head)).strip()
        assert key not in found, f"two tables begin with {key}"
        found[key] = [_cells(row) for row in rows]
    return found


def number(cell: str) -> float:
    """The number of a cell: "5,000", "−0.03 %", "1e-4"."""
    return float(cell.replace(",", "").replace("−", "-").removesuffix("%").strip())


def options_named(text: str) -> set[str]:
    """The options that a page names, without --no- and without those in links."""
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return {name.removeprefix("no-") for name in re.findall(r"--([a-zA-Z][\w-]+)", text)}


def train_as_told(command: list[str], files: Mapping[str, Path], *small: str) -> None:
    """Run a page's command, without its first word, for one step in the working directory, on two images in
    my_data/10_mystyle. `files`: options to the files that stand for those that the page names."""
    copy_images(Path("my_data/10_mystyle"), 2)
    given = {f"--{name}": str(path) for name, path in files.items()}
    words = [given.get(before, word) for before, word in zip(["", *command[1:]], command[1:], strict=False)]
    short = ["--max_train_epochs", "0", "--max_train_steps", "1", "--no-enable_bucket", "--resolution", "64"]
    assert import_module(command[0].removesuffix(".py")).main([*words, *short, *small]) == 0
    assert list(Path("output").rglob("*.safetensors"))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
