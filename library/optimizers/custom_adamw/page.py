"""Writes the files that are generated from the techniques' declarations: the table in docs/optimizer.md, keywords.pyi.

python -m library.optimizers.custom_adamw.page
"""

from __future__ import annotations

import inspect
from pathlib import Path

from .technique import Technique
from .techniques import arguments, techniques

PAGE = Path(__file__).parents[3] / "docs" / "optimizer.md"
STUB = Path(__file__).with_name("keywords.pyi")
_BEGIN, _END = "<!-- from the techniques' declarations -->\n", "<!-- end -->\n"


def table() -> str:
    """The techniques, as Markdown."""
    head = "| flag | default | what it does | settings | paper |\n|---|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join(_row(kind))} |\n" for kind in techniques())


def _row(kind: type[Technique]) -> tuple[str, ...]:
    switch, *others = (item for item in kind.settings() if not item.of_group)
    does = (inspect.getdoc(kind) or "").partition("\n")[0].removesuffix(".")
    settings = ", ".join(f"`--{item.name}` {item.shown}" for item in others if item.default != ())
    papers = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in kind.papers)
    return (f"`--{switch.name}`", switch.shown, does[:1].lower() + does[1:], settings, papers or "none: our own")


def with_table(page: str) -> str:
    """The text of docs/optimizer.md with the table between its marks."""
    before, _, rest = page.partition(_BEGIN)
    return f"{before}{_BEGIN}\n{table()}\n{_END}{rest.partition(_END)[2]}"


def stub() -> str:
    """The text of keywords.pyi."""
    lines = (f"    {name}: {item.annotation}".replace("'", '"') for name, item in arguments().items())
    return "\n".join(
        (
            "# Written by `python -m library.optimizers.custom_adamw.page` from the techniques' declarations",
            "from typing import Literal, TypedDict",
            "",
            "class Keywords(TypedDict, total=False):",
            *lines,
            "",
        )
    )


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
    STUB.write_text(stub(), encoding="utf-8", newline="\n")
