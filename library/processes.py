"""The processes of a run, where a launcher has started several: which of them speaks, and what a lost one means."""

from __future__ import annotations

import os
import time

_PATIENCE = 5.0  # seconds
LOST = (
    "another process of this run has ended, or has not answered for longer than --ddp_timeout, and this one cannot go "
    "on without it. What it said stands above, or on its own machine; --resume latest goes on from the last state"
)


def are_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this is the one that writes files and tells what happens."""
    return int(os.environ.get("RANK", "0")) == 0


def let_the_first_speak() -> None:
    """Wait before an error is printed: as a rule all processes find the same one, and the launcher ends the others as
    soon as the first has ended. Who lives on after that has something of its own to say."""
    if not is_first():
        time.sleep(_PATIENCE)


def is_of_a_lost_one(error: Exception) -> bool:
    """Whether this is what communication fails with when another process is no longer there."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return are_several() and ("DistError" in names or ("RuntimeError" in names and "gloo" in str(error)))
