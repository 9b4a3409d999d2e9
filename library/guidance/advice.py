"""A recommended setting, and whether the user's own comes first."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.options import Options
from library.config.settings import COMMAND_LINE


@dataclass(frozen=True)
class Advice:
    """`value` as the option has it."""

    option: str
    value: int | float | str | bool
    why: str


def is_final(options: Options, name: str) -> bool:
    """Whether the command line sets this option: it wins over the file that is written."""
    return options.given.get(name, "").startswith(COMMAND_LINE)
