"""`python -m library.report FOLDER_OR_METRICS`: write the reports of the runs there, anew or for the first time."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from library import log
from library.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 for mistakes that the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m library.report", description=__doc__)
    parser.add_argument("where", type=Path, help="a run's folder, or its NAME-metrics.jsonl")
    options = parser.parse_args(argv)
    log.configure()
    try:
        from library.report.page import write
        from library.report.read import find_metrics

        for path in find_metrics(options.where):
            write(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
