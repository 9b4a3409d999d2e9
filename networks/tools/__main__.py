"""All tools as one command: `python -m networks.tools SUBCOMMAND …`, installed as `lora-tools`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from library.config.command import run
from library.config.registry import load_path
from library.errors import UserError, did_you_mean

COMMANDS = {
    "check": ("networks.tools.check.main", "what an adapter file is, and which programs load it"),
    "convert": ("networks.tools.convert.main", "an adapter file in another program's names"),
    "evaluate": ("library.evaluation.evaluate.main", "the loss of LoRA files on folders of images"),
    "draw": ("library.evaluation.draw.main", "prompts × LoRA files × multipliers × seeds as one picture"),
    "find_rank": ("library.evaluation.find_rank.main", "train at several ranks, and name the smallest that is enough"),
}
"""Each with the import path of its `main(argv)`, which returns the exit code, and a line for the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for what the user can put right."""
    return run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m networks.tools SUBCOMMAND …    (SUBCOMMAND --help shows its options)\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<12}{text}")
        return 0 if argv else 2
    name, *words = argv
    if name not in COMMANDS:
        raise UserError(f"'{name}' is no tool{did_you_mean(name, COMMANDS)}; there are {', '.join(COMMANDS)}")
    code: int = load_path(COMMANDS[name][0], where=name)(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
