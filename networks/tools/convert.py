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

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.config.command import Command, Word, read, run
from library.config.fields import REQUIRED, option
from library.errors import UserError
from library.models.checkpoints.adapter_file import WrittenNaming
from networks import base_weights
from networks.tools.output import check_output

logger = logging.getLogger(__name__)

# The alphas of diffusers' names; a hash of the tensors as they lay in that file
_OF_THE_OLD_FILE = ("lora_adapter_metadata", "modelspec.hash_sha256")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """The result"""

    to: Literal[WrittenNaming, "lora"] = option(REQUIRED, help="whose names, or lora")
    rank: int | None = option(None, minimum=1, help="with --to lora: of the result; without it exact, or an error")
    conv_rank: int | None = option(None, minimum=1, help="that of convolutions wider than 1 × 1; without it --rank")
    base: str | None = option(None, help="with --to lora: the base model, a file or a folder")


COMMAND = Command(
    name="lora-tools convert",
    description=__doc__,
    groups={"convert": ConvertOptions},
    words=(Word("SOURCE", "the adapter file to read"), Word("TARGET", "the .safetensors to write")),
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    options: ConvertOptions = given.groups["convert"]
    source, target = map(Path, given.words)
    if options.to != "lora":
        if idle := [name for name in given.given if name != "to"]:
            raise UserError(f"--{idle[0]} has no effect without --to lora")
        convert(source, target, to=options.to)
        return 0
    from networks.tools.to_lora import to_lora

    check_output(target, [source], overwrite=False, option="TARGET")
    to_lora(source, target, rank=options.rank, conv_rank=options.conv_rank, base=options.base)
    return 0


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
    sys.exit(run(main))
