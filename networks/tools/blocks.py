"""The block of a model that a layer of an adapter file lies in, from its name alone. Imports no torch."""

from __future__ import annotations

import re

_BLOCK = re.compile(
    r"(?P<prefix>lora_unet|oft_unet|lora_te\d?)_(?P<block>"
    r"down_blocks_\d+|mid_block|up_blocks_\d+|input_blocks_\d+|middle_block|output_blocks_\d+"
    r"|(?:text_model_)?encoder_layers_\d+)(?:_|\Z)"
)
_ORDER = ("encoder", "text", "down", "input", "mid", "up", "output")


def block_of(layer: str) -> str:
    """ "unet down_blocks_0", "te1 encoder_layers_3"; of a layer outside of every block the part, as "unet"."""
    match = _BLOCK.match(layer)
    if match is None:
        words = layer.split("_")
        return words[1] if len(words) > 1 else layer
    part = match["prefix"].partition("_")[2]
    return f"{part} {match['block'].removeprefix('text_model_')}"


def order(block: str) -> tuple[str, int, int]:
    """A key that sorts blocks as they lie in the model, text encoders first."""
    part, _, name = block.partition(" ")
    kind = next((place for place, start in enumerate(_ORDER) if name.startswith(start)), len(_ORDER))
    number = re.search(r"(\d+)\Z", name)
    return part, kind, int(number[1]) if number else 0
