"""kohya's networks/merge_lora.py: its options, over `networks.tools.merge`.

python networks/merge_lora.py --models a.safetensors b.safetensors --ratios 0.7 0.3 --save_to c.safetensors

The result has the highest rank of the files; with --concat their ranks add up, and it is exact.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # a script's own folder leads the search for modules, where the project's root has to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from networks.tools import kohya


def add_options(parser: argparse.ArgumentParser) -> None:
    """kohya's."""
    kohya.add_result_options(parser)
    kohya.add_merge_options(parser, blocks=False)
    kohya.add_factors_options(parser)
    parser.add_argument("--v2", action="store_true", help="without effect: the files state their family")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return kohya.run(__doc__, add_options, kohya.merge_loras, argv)


if __name__ == "__main__":
    sys.exit(main())
