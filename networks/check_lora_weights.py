"""kohya's networks/check_lora_weights.py: prints the shape of each tensor of a LoRA, and the mean and the least of its
absolute values.

python networks/check_lora_weights.py a.safetensors

`python -m networks.tools check` prints what the file is, and which programs load it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # a script's own folder leads the search for modules, where the project's root has to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from library.config.command import Command, Word, read, run
from library.config.fields import option

_KINDS = ("lora_up", "lora_down", "lora_A", "lora_B", "oft_")


@dataclass(frozen=True, kw_only=True)
class ShapesOptions:
    """Options"""

    show_all_keys: bool = option(False, aliases=("s",), help="tensors of other names as well")


NAME, FILE = "networks/check_lora_weights.py", Word("FILE", "the adapter file")
COMMAND = Command(name=NAME, description=__doc__, groups={"options": ShapesOptions}, words=(FILE,))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(show, argv)


def show(argv: Sequence[str]) -> int:
    """Print. Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    from networks.files import read_tensors  # torch loads here

    tensors = read_tensors(Path(given.words[0]))
    shown = [key for key in tensors if any(part in key for part in _KINDS)]
    print(f"number of LoRA modules: {len(shown)}")
    if given.groups["options"].show_all_keys:
        shown += [key for key in tensors if key not in shown]
        print(f"number of all modules: {len(shown)}")
    for key in shown:
        values = tensors[key].float().abs()
        print(f"{key},{str(tuple(values.shape)).replace(', ', '-')},{values.mean()},{values.min()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
