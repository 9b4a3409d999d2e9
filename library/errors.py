"""What a user did wrong, said plainly."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Something the user gave cannot be used: the message names the place, the value and the nearest right one.

    The command line prints it without a traceback and ends with exit code 2. Faults of the program itself are
    `AssertionError` or whatever Python raises, and keep their traceback.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the nearest of `known`, or an empty string if none is near."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return f", did you mean '{lowered[near[0]]}'?" if near else ""


def nearest_path(path: Path) -> str:
    """A hint for a path that does not exist: the nearest name to its first part that does not, or else that part."""
    wrong = path
    while not wrong.parent.exists() and wrong.parent != wrong:
        wrong = wrong.parent
    try:
        names = [entry.name for entry in wrong.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(wrong.name, names, n=1, cutoff=0.5)
    if near:
        return f", did you mean '{wrong.parent / near[0]}'?"
    return f"; there is no '{wrong}'" if wrong != path else ""
