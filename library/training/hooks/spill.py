"""Warns of a GPU whose driver uses the computer's memory when its own is full, as on Windows: steps then crawl."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from library.training.hook import Hook, Step
from library.training.run import Run

if TYPE_CHECKING:
    from library.data.dataset import Batch

logger = logging.getLogger(__name__)

SLOWER = 5.0
"""Times the median of earlier steps with the same batches, from which a step is slow."""
_FEWEST, _KEPT, _IN_A_ROW = 5, 50, 3

Work = tuple[tuple[tuple[int, int], int], ...]
"""The image size and the number of images of each batch of a step."""


class Spill(Hook[Run]):
    """Compares the time of each step with earlier steps of the same batches. Warns once, after three slow ones in a
    row: a single one can have waited for data."""

    name = "spill"

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: float | None = None
        self._work: Work = ()
        self._seconds: dict[Work, deque[float]] = {}
        self._slow = 0
        self._warned = False

    def before_batch(self, run: Run, batch: Batch) -> None:
        if self._began is None:
            self._began = self._clock()
        self._work = (*self._work, (batch.target_size, len(batch.samples)))

    def after_step(self, run: Run, step: Step) -> None:
        if self._began is None:
            return
        seconds, work = self._clock() - self._began, self._work
        self._began, self._work = None, ()
        earlier = self._seconds.setdefault(work, deque(maxlen=_KEPT))
        if len(earlier) < _FEWEST or seconds < SLOWER * (usual := statistics.median(earlier)):
            earlier.append(seconds)
            self._slow = 0
            return
        self._slow += 1
        if self._slow == _IN_A_ROW and not self._warned:
            self._warned = True
            logger.warning(
                "step %d: three steps in a row took more than %g times as long as earlier ones with the same batches "
                "(%.1f s, before %.1f s): the GPU's memory is probably full, and its driver uses the computer's "
                "instead. --dry_run lists what needs less memory; close other programs that use the GPU",
                *(step.number, SLOWER, seconds, usual),
            )

    def skip(self, run: Run, problem: object) -> bool:
        self._began, self._work = None, ()
        return False
