"""What all tools that write a file share: their options, and the check of the name. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.config.fields import REQUIRED, option
from library.errors import UserError

Precision = Literal["float", "fp32", "fp16", "bf16"]  # kohya calls fp32 float


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """What is written"""

    overwrite: bool = option(False, help="replace the file where it exists")
    save_precision: Precision | None = option(None, help="element type of the result; without it that of the sources")


@dataclass(frozen=True, kw_only=True)
class OutputOptions(ResultOptions):
    """What is written"""

    save_to: Path = option(REQUIRED, help="the .safetensors to write")


def check_output(
    target: Path, sources: Sequence[Path], *, overwrite: bool, option: str = "--save_to", end: str = ".safetensors"
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
