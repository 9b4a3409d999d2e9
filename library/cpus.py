"""How many CPUs there are for this process, and threads for work that releases the GIL: decoding, hashing, reading."""

from __future__ import annotations

import os
import sys

MOST_THREADS = 16  # more wait for the disk or for memory


def cpu_count() -> int:
    """The CPUs that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def thread_count() -> int:
    """The threads of a pool."""
    return min(MOST_THREADS, cpu_count())
