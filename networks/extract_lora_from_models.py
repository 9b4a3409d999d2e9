"""kohya's networks/extract_lora_from_models.py: its options and defaults, over `networks.tools.extract`.

python networks/extract_lora_from_models.py --model_org sd15.safetensors --model_tuned tuned.safetensors --save_to …
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # a script's own folder leads the search for modules, where the project's root has to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from library.config.fields import REQUIRED, option
from networks.tools import extract, kohya

_FAMILY, _CPU = "the files show their family", "layers are compared on the CPU in fp32"
_ON_CPU = ("load_precision", "device", "load_original_model_to", "load_tuned_model_to")


@dataclass(frozen=True, kw_only=True)
class ExtractLoraOptions(kohya.SpecOptions):
    """Options"""

    model_org: str = option(REQUIRED, help="the model that the LoRA is for")
    model_tuned: str = option(REQUIRED, help="the model that both are to act like")
    dim: int = option(4, minimum=1, help="the rank")
    conv_dim: int | None = option(None, minimum=1, help="that of wide convolutions; without it these are left out")
    clamp_quantile: float = option(0.99, help="clip factors at this quantile; 1: do not")
    min_diff: float = option(0.01, minimum=0, help="least difference of a text encoder")
    v_parameterization: bool = option(False, help="the models are of v prediction")
    v2: bool = option(False, help=f"no effect: {_FAMILY}")
    sdxl: bool = option(False, help=f"no effect: {_FAMILY}")
    load_precision: str | None = option(None, help=f"no effect: {_CPU}")
    load_original_model_to: str | None = option(None, help=f"no effect: {_CPU}")
    load_tuned_model_to: str | None = option(None, help=f"no effect: {_CPU}")


def act(options: ExtractLoraOptions) -> None:
    """Extract. Raises UserError."""
    kohya.say_without_effect(options, dict.fromkeys(("v2", "sdxl"), _FAMILY) | dict.fromkeys(_ON_CPU, _CPU))
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
    return kohya.run(__doc__, ExtractLoraOptions, act, argv)


if __name__ == "__main__":
    sys.exit(main())
