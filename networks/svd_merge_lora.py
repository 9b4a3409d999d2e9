"""kohya's networks/svd_merge_lora.py: its options and defaults, over `networks.tools.merge`.

python networks/svd_merge_lora.py --models a.safetensors b.safetensors --new_rank 8 --save_to c.safetensors

kohya clips the factors at the 0.99 quantile of their values, which loses the largest ones: here with --as_kohya alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # a script's own folder leads the search for modules, where the project's root has to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from networks.tools import kohya


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return kohya.run(__doc__, kohya.RankOptions, kohya.merge_to_rank, argv)


if __name__ == "__main__":
    sys.exit(main())
