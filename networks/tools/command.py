"""The part that all sub-commands share: one parser, one way of errors. Imports no torch.

A sub-command is a module with a docstring, `add_options(parser)` and `run(options)`, which returns the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from library.config.command import run
from library.errors import UserError

PRECISIONS = ("float", "fp32", "fp16", "bf16")  # of --save_precision; kohya calls fp32 float


def parser_of(module: ModuleType) -> argparse.ArgumentParser:
    """The parser of a sub-command."""
    assert module.__spec__ is not None
    parser = argparse.ArgumentParser(
        prog=f"lora-tools {module.__spec__.name.rpartition('.')[2]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_options(parser)
    return parser


def execute(module: ModuleType, argv: Sequence[str]) -> int:
    """Run a sub-command. Returns the exit code. Raises UserError."""
    code: int = module.run(parser_of(module).parse_args(argv))
    return code


def run_alone(name: str, argv: Sequence[str] | None = None) -> int:
    """Run the sub-command whose module has this name, which may be "__main__", without its own name in the arguments.

    Returns the exit code: 2 for what the user can put right.
    """
    return run(partial(execute, sys.modules[name]), argv)


def add_output(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The options of every sub-command that writes an adapter file."""
    parser.add_argument("--save_to", metavar="FILE", type=Path, required=required, help="the .safetensors to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file where it exists")
    parser.add_argument(
        "--save_precision", choices=PRECISIONS, help="element type of the result; without it that of the sources"
    )


def check_output(
    target: Path, sources: list[Path], *, overwrite: bool, option: str = "--save_to", end: str = ".safetensors"
) -> None:
    """`UserError` for a result that would replace a source, or an existing file without `overwrite`."""
    if target.suffix != end:
        raise UserError(f"{option} {target}: the name has to end with {end}, which is what is written")
    for source in sources:
        if target.exists() and source.exists() and target.samefile(source):
            raise UserError(f"{option} {target}: is one of the sources; give another name")
    if target.is_dir():
        raise UserError(f"{option} {target}: is a folder; give the name of a file")
    if target.exists() and not overwrite:
        raise UserError(f"{option} {target}: exists already; give another name, or --overwrite")
