"""Ending a run early by a signal, between two steps."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """Turns Ctrl-C, SIGTERM or SIGHUP into a request to stop after the running step; a second Ctrl-C stops at once.

    SIGHUP is sent when a terminal is closed or a connection is lost; under nohup it is ignored. A signal often arrives
    twice: from the shell and the terminal, from `timeout`, or from launchers that pass on a signal to the whole process
    group. Only a Ctrl-C that comes later than that is the user's second one.
    """

    TWICE = 1.0  # seconds within which two signals are one

    requested: signal.Signals | None = None
    _since = 0.0

    def __enter__(self) -> StopRequest:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = signal.Signals(signum), time.monotonic()
            logger.warning("stopping after this step; Ctrl-C again to stop at once, without saving")
        elif signum == signal.SIGINT and time.monotonic() - self._since > self.TWICE:
            raise KeyboardInterrupt

    def of_any(self, accelerator: Accelerator) -> signal.Signals | None:
        """The request of any process: all stop after the same step, although signals reach them at different times."""
        if accelerator.num_processes == 1:
            return self.requested
        numbers = accelerator.gather(torch.tensor([self.requested or 0], device=accelerator.device))
        highest = int(numbers.max())
        return signal.Signals(highest) if highest else None

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
