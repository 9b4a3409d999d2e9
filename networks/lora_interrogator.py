"""kohya's networks/lora_interrogator.py: its options and defaults, over `library.evaluation.interrogate`.

python networks/lora_interrogator.py --sd_model sd15.safetensors --model a.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # a script's own folder leads the search for modules, where the project's root has to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from library.config.fields import REQUIRED, option
from library.evaluation import interrogate
from networks.tools import kohya


@dataclass(frozen=True, kw_only=True)
class InterrogatorOptions:
    """Options"""

    v2: bool = option(False, help="a Stable Diffusion 2.x model")
    sd_model: str = option(REQUIRED, help="the base model")
    model: Path = option(REQUIRED, help="the LoRA file")
    batch_size: int = option(16, minimum=1, help="tokens at once")
    clip_skip: int | None = option(None, minimum=1, help="the layer of the text encoder, counted from its end")


def act(options: InterrogatorOptions) -> None:
    """Print the hundred most changed tokens. Raises UserError."""
    words = [str(options.model), "--pretrained_model_name_or_path", options.sd_model, "--top", "100"]
    words += ["--batch_size", str(options.batch_size)] + ["--v2"] * options.v2
    words += [] if options.clip_skip is None else ["--clip_skip", str(options.clip_skip)]
    interrogate.main(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return kohya.run(__doc__, InterrogatorOptions, act, argv)


if __name__ == "__main__":
    sys.exit(main())
