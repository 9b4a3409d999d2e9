"""Rename a LoRA file's tensors: to diffusers' names, or from diffusers' or PEFT's to kohya's.

python -m networks.tools.convert lora.safetensors lora-diffusers.safetensors --to diffusers
python -m networks.tools.convert lora-diffusers.safetensors lora.safetensors --to kohya
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from library import log
from library.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 for what the user can put right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the LoRA file to read")
    parser.add_argument("target", type=Path, help="the .safetensors to write")
    parser.add_argument("--to", choices=("diffusers", "kohya"), required=True, help="whose names to write")
    options = parser.parse_args(argv)
    log.configure()
    try:
        convert(options.source, options.target, to=options.to)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(source: Path, target: Path, *, to: str) -> None:
    """Write `target`, which must not exist, with the tensors of `source` under other names and the same metadata."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from networks.naming import to_diffusers
    from networks.weights import read_weights

    if target.exists():
        raise UserError(f"{target}: exists already; give another name, or remove it")
    # in kohya's names, whatever the file has; only those have a way to name embeddings beside a LoRA
    tensors = read_weights(source, purpose="is renamed", keep_embeddings=to == "kohya")
    if to == "diffusers":
        tensors = to_diffusers(tensors, source=str(source))
    metadata = None
    if source.suffix == ".safetensors":
        with safe_open(source, framework="pt") as file:
            metadata = {key: text for key, text in (file.metadata() or {}).items() if key != "lora_adapter_metadata"}
    beside = target.with_name(f".{target.name}.part")
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside, metadata or None)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
