"""Destination and format of log messages."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from library import processes
from library.errors import UserError, why_not

_OURS = ("library", "networks")


def set_up() -> None:
    """Buffer messages until `configure` sets their destination: warnings about options come before that is known."""
    _install(logging.handlers.MemoryHandler(1000, flushLevel=sys.maxsize, target=_AboveTheBar(), flushOnClose=False))


def configure(*, level: str | None = None, file: str | None = None) -> None:
    """Log plain lines to stderr, or to `file` instead, from `level` on (INFO); warnings are marked as such.

    Other packages' messages appear from warnings on. Of several processes only the first logs.
    """
    held = list(logging.getLogger().handlers)
    target: logging.Handler = _AboveTheBar()
    if file is not None and processes.is_first():
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            target = _File(file, mode="w", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--console_log_file {file}: cannot be written: {why_not(error, verb='write to')}"
            ) from error
        target.setFormatter(_Plain("%(asctime)s %(message)s"))
    _install(target, level=getattr(logging, level or "INFO"))
    _release(held, target)


def give_up_waiting() -> None:
    """Write the buffered messages to stderr: the options turned out to be wrong."""
    _release(logging.getLogger().handlers, _AboveTheBar())


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """A context in which the program survives a closed or full stdout or stderr: such output is dropped.

    Causes: Ctrl-C ends every program of `train_network.py … | tee log`, a terminal is closed, the disk of `2> log` is
    full.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Lasting(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Lasting):
                stream.give_up()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """A context in which only errors are logged, for objects that are made only to check their arguments."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _install(handler: logging.Handler, *, level: int = logging.INFO) -> None:
    quiet = logging.ERROR if not processes.is_first() else logging.WARNING
    if handler.formatter is None:
        handler.setFormatter(_Plain())
    logging.basicConfig(level=max(quiet, level), handlers=[handler], force=True)
    # At import it reports a missing optional kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for package in _OURS:
        logging.getLogger(package).setLevel(level if processes.is_first() else max(level, logging.ERROR))


def _release(handlers: list[logging.Handler], target: logging.Handler) -> None:
    """Pass the buffered messages to `target`, if they reach the current levels."""
    for handler in handlers:
        if isinstance(handler, logging.handlers.MemoryHandler):
            for record in handler.buffer:
                if logging.getLogger(record.name).isEnabledFor(record.levelno):
                    target.handle(record)
            handler.buffer.clear()


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _AboveTheBar(logging.Handler):
    """Writes to stderr, above a progress bar that is drawn there."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Plain())

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(self.format(record), file=sys.stderr)
        else:
            print(self.format(record), file=sys.stderr)


class _File(logging.FileHandler):
    """Writes to a file, or to stderr if the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:
        _AboveTheBar().handle(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _Lasting:
    """A text stream that drops the output that its underlying stream cannot take."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        # RuntimeError: a signal's handler writes while the same stream is being written to
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a console with ASCII only
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._stream.flush()

    def give_up(self) -> None:
        """Discard all buffered output: Python would try to write it at exit, and end with another exit code."""
        try:
            self._stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except ValueError:  # it is closed
            pass
