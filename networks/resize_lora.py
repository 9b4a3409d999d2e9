"""kohya's networks/resize_lora.py: its options and defaults, over `networks.tools.resize`.

python networks/resize_lora.py --model a.safetensors --save_to b.safetensors --new_rank 8
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # a script's own folder leads the search for modules, where the project's root has to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from library.config.fields import REQUIRED, option
from networks.tools import kohya, resize


@dataclass(frozen=True, kw_only=True)
class ResizeLoraOptions(kohya.DoorOptions):
    """Options"""

    model: Path = option(REQUIRED, help="the LoRA file")
    new_rank: int = option(4, minimum=1, help="of the result; with --dynamic_method the highest")
    new_conv_rank: int | None = option(None, minimum=1, help="that of wide convolutions; without it --new_rank")
    dynamic_method: resize.Dynamic | None = option(None, help="choose each layer's rank by its values")
    dynamic_param: float | None = option(None, help="the method's parameter")
    verbose: bool = option(False, help="print rank and kept energy of each layer")


def act(options: ResizeLoraOptions) -> None:
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
    return kohya.run(__doc__, ResizeLoraOptions, act, argv)


if __name__ == "__main__":
    sys.exit(main())
