"""Rename an adapter file's tensors, or write another kind of adapter as a plain LoRA.

python -m networks.tools convert lora.safetensors lora-diffusers.safetensors --to diffusers
python -m networks.tools convert lora-diffusers.safetensors lora.safetensors --to kohya
python -m networks.tools convert lokr.safetensors lora.safetensors --to lora --rank 16
python -m networks.tools convert oft.safetensors lora.safetensors --to lora --rank 16 --base sd15.safetensors

Of diffusers' names there are those of LoRA and of DoRA of rows; kohya's are read from any. A LoRA is exact where the
kind is of low rank and --rank does not cut it; the kept share of the energy is printed. DoRA, OFT, BOFT, (IA)³ and
GLoRA need the base model, and so do convolutions whose kernel the tensors do not show.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import get_args

from library.errors import UserError
from library.models.checkpoints.adapter_file import WrittenNaming
from networks import base_weights
from networks.tools import command

logger = logging.getLogger(__name__)

# The alphas of diffusers' names; a hash of the tensors as they lay in that file
_OF_THE_OLD_FILE = ("lora_adapter_metadata", "modelspec.hash_sha256")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the sub-command."""
    parser.add_argument("source", type=Path, help="the LoRA file to read")
    parser.add_argument("target", type=Path, help="the .safetensors to write")
    parser.add_argument("--to", choices=(*get_args(WrittenNaming), "lora"), required=True, help="whose names, or lora")
    parser.add_argument("--rank", type=int, help="with --to lora: of the result; without it exact, or an error")
    parser.add_argument("--conv_rank", type=int, help="that of convolutions wider than 1 × 1; without it --rank")
    parser.add_argument("--base", metavar="MODEL", help="with --to lora: the base model, a file or a folder")


def run(options: argparse.Namespace) -> int:
    """Returns the exit code."""
    if options.to != "lora":
        for name in ("rank", "conv_rank", "base"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} has no effect without --to lora")
        convert(options.source, options.target, to=options.to)
        return 0
    from networks.tools.to_lora import to_lora

    command.check_output(options.target, [options.source], overwrite=False, option="target")
    to_lora(options.source, options.target, rank=options.rank, conv_rank=options.conv_rank, base=options.base)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 for what the user can put right."""
    return command.run_alone(__name__, argv)


def convert(source: Path, target: Path, *, to: WrittenNaming) -> None:
    """Write `target`, which must not exist, with the tensors of `source` under other names.

    Its metadata are those of `source`, with the hashes of the new file.
    """
    from networks import files
    from networks.formats.naming import in_names_of

    if target.exists():
        raise UserError(f"{target}: exists already; give another name, or remove it")
    # only kohya's names have a way to name embeddings beside a LoRA
    content = files.read(source, purpose="is renamed", keep_embeddings=to == "kohya")
    tensors, more = in_names_of(content.tensors, to, source=str(source))
    metadata = {key: text for key, text in content.metadata.items() if key not in _OF_THE_OLD_FILE} | more
    if trained_on := base_weights.read(source):
        logger.warning("%s: acts as it was trained only on top of %s", source, base_weights.in_words(trained_on))
    files.write(target, {**tensors, **content.embeddings}, metadata)


if __name__ == "__main__":
    sys.exit(main())
