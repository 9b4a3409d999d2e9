"""The processes of a run that a launcher has started: which one logs, and how the loss of one is recognised."""

from __future__ import annotations

import os
import time

_PATIENCE = 5.0  # seconds
LOST = (
    "another process of this run has ended, or has not answered for longer than --ddp_timeout, and this one cannot "
    "continue without it. Its messages are above, or on its own machine; --resume latest continues from the last state"
)


def are_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this is the first process, which writes files and logs."""
    return int(os.environ.get("RANK", "0")) == 0


def let_the_first_speak() -> None:
    """Wait before an error is printed: usually all processes find the same one, and the launcher kills the others as
    soon as the first has ended. A process that is still alive after that has an error of its own."""
    if not is_first():
        time.sleep(_PATIENCE)


def is_of_a_lost_one(error: Exception) -> bool:
    """Whether this is the error of communication with a process that no longer exists."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return are_several() and ("DistError" in names or ("RuntimeError" in names and "gloo" in str(error)))
