"""kohya's networks/sdxl_merge_lora.py: its options, over `networks.tools.merge`.

python networks/sdxl_merge_lora.py --models a.safetensors b.safetensors --ratios 0.7 0.3 --save_to c.safetensors

The result has the highest rank of the files; with --concat their ranks add up, and it is exact.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # a script's own folder leads the search for modules, where the project's root has to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from networks.tools import kohya


@dataclass(frozen=True, kw_only=True)
class SdxlMergeOptions(kohya.FactorsOptions, kohya.BlockOptions):
    """Options"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return kohya.run(__doc__, SdxlMergeOptions, kohya.merge_loras, argv)


if __name__ == "__main__":
    sys.exit(main())
