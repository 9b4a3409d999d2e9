"""The part that all sub-commands share: one parser, one way of errors. Imports no torch.

A sub-command is a module with a docstring, `add_options(parser)` and `run(options)`, which returns the exit code.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import ModuleType

from library import log
from library.errors import UserError

PRECISIONS = ("float", "fp32", "fp16", "bf16")  # of --save_precision; kohya calls fp32 float


def parser_of(module: ModuleType, parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The parser of a sub-command; a new one where none is given."""
    parser = parser or argparse.ArgumentParser(
        description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    module.add_options(parser)
    parser.set_defaults(run=module.run)
    return parser


def execute(options: argparse.Namespace) -> int:
    """Run the chosen sub-command. Returns the exit code: 2 for what the user can put right."""
    log.configure()
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the report, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        return 0
    return code


def run_alone(name: str, argv: list[str] | None = None) -> int:
    """Run the sub-command whose module has this name, without the name of a sub-command in the arguments."""
    parser = parser_of(sys.modules[name])
    parser.prog = f"lora-tools {name.rpartition('.')[2]}"
    return execute(parser.parse_args(argv))


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
