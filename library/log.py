"""How messages look on the console."""

from __future__ import annotations

import logging
import os
import sys


def set_up() -> None:
    """Plain lines on stderr; a warning says that it is one. Of several processes only the first tells what happens."""
    first = int(os.environ.get("RANK", "0")) == 0
    handler = _AboveTheBar()
    handler.setFormatter(_Plain())
    logging.basicConfig(level=logging.WARNING if first else logging.ERROR, handlers=[handler], force=True)
    # At import it reports a missing optional kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for package in ("library", "networks"):
        logging.getLogger(package).setLevel(logging.INFO if first else logging.ERROR)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _AboveTheBar(logging.Handler):
    """Writes to stderr, past a progress bar that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(self.format(record), file=sys.stderr)
        else:
            print(self.format(record), file=sys.stderr)
