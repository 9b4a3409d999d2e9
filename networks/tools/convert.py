"""Rename an adapter file's tensors: to diffusers' names (LoRA and DoRA of rows), or from any to kohya's.

python -m networks.tools convert lora.safetensors lora-diffusers.safetensors --to diffusers
python -m networks.tools convert lora-diffusers.safetensors lora.safetensors --to kohya
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
    parser.add_argument("--to", choices=get_args(WrittenNaming), required=True, help="whose names to write")


def run(options: argparse.Namespace) -> int:
    """Returns the exit code."""
    convert(options.source, options.target, to=options.to)
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
