"""All tools as one command: `python -m networks.tools SUBCOMMAND …`, installed as `lora-tools`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from library.config.command import run
from library.errors import UserError, did_you_mean

COMMANDS = {
    "merge": ("networks.tools.merge", "LoRA files into one, by several methods, or into a base model"),
    "resize": ("networks.tools.resize", "a file at a lower rank"),
    "extract": ("networks.tools.extract", "the difference of two base models as a LoRA"),
    "ranks": ("networks.tools.ranks", "how much of its rank a file uses"),
    "inspect": ("networks.tools.inspect", "a file's metadata in words, its norms, its training settings"),
    "compare": ("networks.tools.compare", "two files, layer by layer"),
    "ema": ("networks.tools.ema", "the average of a run's files"),
    "convert": ("networks.tools.convert", "an adapter file in other names, or another kind as a LoRA"),
    "check": ("networks.tools.check", "what an adapter file is, and which programs load it"),
    "evaluate": ("library.evaluation.evaluate", "the loss of LoRA files on folders of images"),
    "draw": ("library.evaluation.draw", "prompts × LoRA files × multipliers × seeds as one picture"),
    "interrogate": ("library.evaluation.interrogate", "the tokens that a LoRA changes most in the text encoders"),
    "cross_validate": ("library.evaluation.cross_validate", "train on several splits of the images, and average"),
    "tasks": ("library.evaluation.tasks", "train one task after another, and measure what was forgotten"),
    "find_rank": ("library.evaluation.find_rank", "train at several ranks, and name the smallest that is enough"),
}
"""Each with its module and a line for the help. A module has its `COMMAND`, and `main(argv)`, which returns the exit
code and raises UserError."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for what the user can put right."""
    return run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m networks.tools SUBCOMMAND …    (SUBCOMMAND --help shows its options)\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<16}{text}")
        return 0 if argv else 2
    name, *words = argv
    if name not in COMMANDS:
        raise UserError(f"'{name}' is no tool{did_you_mean(name, COMMANDS)}; there are {', '.join(COMMANDS)}")
    path, _ = COMMANDS[name]
    module = importlib.import_module(path)
    code: int = module.main(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
