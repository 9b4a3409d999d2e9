"""kohya's networks/check_lora_weights.py: prints the shape of each tensor of a LoRA, and the mean and the least of its
absolute values.

python networks/check_lora_weights.py a.safetensors

`python -m networks.tools check` prints what the file is, and which programs load it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # a script's own folder leads the search for modules, where the project's root has to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from networks.tools import kohya

_KINDS = ("lora_up", "lora_down", "lora_A", "lora_B", "oft_")


def add_options(parser: argparse.ArgumentParser) -> None:
    """kohya's."""
    parser.add_argument("file", type=Path, help="the adapter file")
    parser.add_argument("-s", "--show_all_keys", action="store_true", help="tensors of other names as well")


def act(options: argparse.Namespace) -> None:
    """Print. Raises UserError."""
    from networks.files import read_tensors

    tensors = read_tensors(options.file)
    shown = [key for key in tensors if any(part in key for part in _KINDS)]
    print(f"number of LoRA modules: {len(shown)}")
    if options.show_all_keys:
        shown += [key for key in tensors if key not in shown]
        print(f"number of all modules: {len(shown)}")
    for key in shown:
        values = tensors[key].float().abs()
        print(f"{key},{str(tuple(values.shape)).replace(', ', '-')},{values.mean()},{values.min()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return kohya.run(__doc__, add_options, act, argv)


if __name__ == "__main__":
    sys.exit(main())
