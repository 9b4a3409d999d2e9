"""Reads the tables and commands of a page of the documentation, for the tests that compare them with the program."""

from __future__ import annotations

import re
import shlex

from tests.conftest import ROOT


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


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
