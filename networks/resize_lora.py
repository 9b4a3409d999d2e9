"""kohya's networks/resize_lora.py: its options and defaults, over `networks.tools.resize`.

python networks/resize_lora.py --model a.safetensors --save_to b.safetensors --new_rank 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # a script's own folder leads the search for modules, where the project's root has to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from networks.tools import kohya, resize


def add_options(parser: argparse.ArgumentParser) -> None:
    """kohya's."""
    kohya.add_result_options(parser, metadata=False)
    parser.add_argument("--model", type=Path, required=True, help="the LoRA file")
    parser.add_argument("--new_rank", type=int, default=4, help="of the result; with --dynamic_method the highest")
    parser.add_argument("--new_conv_rank", type=int, help="that of wide convolutions; without it --new_rank")
    parser.add_argument("--dynamic_method", choices=resize.METHODS, help="choose each layer's rank by its values")
    parser.add_argument("--dynamic_param", type=float, help="the method's parameter")
    parser.add_argument("--verbose", action="store_true", help="print rank and kept energy of each layer")


def act(options: argparse.Namespace) -> None:
    """Resize. Raises UserError."""
    kohya.say_without_effect(options, {"device": "the CPU takes seconds"})
    resize.resize(
        options.model,
        options.save_to,
        rank=options.new_rank,
        conv_rank=options.new_conv_rank,
        method=options.dynamic_method,
        parameter=options.dynamic_param,
        verbose=options.verbose,
        save_precision=options.save_precision or "float",
        overwrite=options.overwrite,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return kohya.run(__doc__, add_options, act, argv)


if __name__ == "__main__":
    sys.exit(main())
