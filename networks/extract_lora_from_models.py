"""kohya's networks/extract_lora_from_models.py: its options and defaults, over `networks.tools.extract`.

python networks/extract_lora_from_models.py --model_org sd15.safetensors --model_tuned tuned.safetensors --save_to …
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # a script's own folder leads the search for modules, where the project's root has to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from networks.tools import extract, kohya

_WITHOUT = dict.fromkeys(("v2", "sdxl"), "the files show their family") | dict.fromkeys(
    ("load_precision", "device", "load_original_model_to", "load_tuned_model_to"),
    "layers are compared on the CPU in fp32",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """kohya's."""
    kohya.add_result_options(parser)
    parser.add_argument("--model_org", required=True, help="the model that the LoRA is for")
    parser.add_argument("--model_tuned", required=True, help="the model that both are to act like")
    parser.add_argument("--dim", type=int, default=4, help="the rank")
    parser.add_argument("--conv_dim", type=int, help="that of wide convolutions; without it these are left out")
    parser.add_argument("--clamp_quantile", type=float, default=0.99, help="clip factors at this quantile; 1: do not")
    parser.add_argument("--min_diff", type=float, default=0.01, help="least difference of a text encoder")
    parser.add_argument("--v_parameterization", action="store_true", help="the models are of v prediction")
    for name in ("v2", "sdxl"):
        parser.add_argument(f"--{name}", action="store_true", help=f"no effect: {_WITHOUT[name]}")
    for name in ("load_precision", "load_original_model_to", "load_tuned_model_to"):
        parser.add_argument(f"--{name}", help=f"no effect: {_WITHOUT[name]}")


def act(options: argparse.Namespace) -> None:
    """Extract. Raises UserError."""
    kohya.say_without_effect(options, _WITHOUT)
    given = vars(options)
    extract.extract(
        *(options.model_org, options.model_tuned, options.save_to),
        **{name: given[name] for name in ("clamp_quantile", "min_diff", "v_parameterization", "overwrite")},
        rank=options.dim,
        conv_rank=options.conv_dim,
        save_precision=options.save_precision or "float",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return kohya.run(__doc__, add_options, act, argv)


if __name__ == "__main__":
    sys.exit(main())
