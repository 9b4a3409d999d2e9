"""Where messages go, and how they look there."""

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
    """Hold messages back until `configure` says where they go: warnings about options come before that is known."""
    _install(logging.handlers.MemoryHandler(1000, flushLevel=sys.maxsize, target=_AboveTheBar(), flushOnClose=False))


def configure(*, level: str | None = None, file: str | None = None) -> None:
    """Plain lines on stderr, or in `file` instead, from `level` on (INFO); a warning says that it is one.

    Other packages' messages appear from warnings on. Of several processes only the first tells what happens.
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
    """Show what is still held back, on stderr: the options turned out to be wrong."""
    _release(logging.getLogger().handlers, _AboveTheBar())


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """A context in which nothing ends because stdout or stderr takes no more: what they do not take is left out.

    Ctrl-C reaches every program of `train_network.py … | tee log`, a terminal is closed, the disk of `2> log` is full.
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
    """A context for objects that are made only to check their arguments: only errors are logged."""
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
    """Hand what was held back to `target`, as far as the levels that are in force now let it through."""
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
    """Writes to stderr, past a progress bar that is drawn there."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Plain())

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(self.format(record), file=sys.stderr)
        else:
            print(self.format(record), file=sys.stderr)


class _File(logging.FileHandler):
    """Print a message to stderr that cannot be written because the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:
        _AboveTheBar().handle(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _Lasting:
    """A text stream that leaves out what the one below it does not take."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        # RuntimeError: a signal's handler writes while the same stream is being written to
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a console that knows no more than ASCII
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._stream.flush()

    def give_up(self) -> None:
        """Leave nothing behind that Python would try to write when it ends, and end with another exit code for."""
        try:
            self._stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except ValueError:  # it is closed
            pass
