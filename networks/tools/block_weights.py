"""Weights by block of the model, as users of A1111's and ComfyUI's extensions write them (LBW). Imports no torch.

A list has a number for each block: 12 or 20 for SDXL, 17 or 26 for SD 1.x and 2.x; the short lists leave out the blocks
in which a LoRA of attention layers has nothing. Or blocks are named, "OUT=0,IN05=0.5": later ones win, the rest is 1.
BASE stands for the text encoders and for the layers outside of all blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from library.errors import UserError, did_you_mean


def _blocks(downs: range | tuple[int, ...], ups: range | tuple[int, ...]) -> tuple[str, ...]:
    return ("BASE", *(f"IN{n:02}" for n in downs), "MID", *(f"OUT{n:02}" for n in ups))


LISTS = {
    12: _blocks((4, 5, 7, 8), range(6)),
    17: _blocks((1, 2, 4, 5, 7, 8), range(3, 12)),
    20: _blocks(range(9), range(9)),
    26: _blocks(range(12), range(12)),
}
"""The blocks of a list, by its length."""
_NAMES = LISTS[26]
_GROUPS = {
    "IN": tuple(name for name in _NAMES if name.startswith("IN")),
    "OUT": tuple(name for name in _NAMES if name.startswith("OUT")),
    "M00": ("MID",),
    "ALL": _NAMES,
}
_SDXL, _SD = (12, 20), (17, 26)
_LAYER = re.compile(
    r"(?:lora|oft)_unet_(?:"
    r"(?P<way>down|up)_blocks_(?P<i>\d+)_(?P<kind>resnets|attentions|downsamplers|upsamplers)_(?P<j>\d+)"
    r"|(?P<side>input|output)_blocks_(?P<n>\d+)|(?P<mid>mid_block|middle_block))_"
)
_STARTS = {"lora_unet_conv_in": "IN00"}  # diffusers' name of input_blocks.0.0


def block_of(layer: str) -> str:
    """The block of a layer, from its name in adapter files, in diffusers' naming or the original one: "IN04"."""
    match = _LAYER.match(f"{layer}_")
    if match is None:
        return _STARTS.get(layer, "BASE")
    if match["mid"]:
        return "MID"
    if match["side"]:
        return f"{'IN' if match['side'] == 'input' else 'OUT'}{int(match['n']):02}"
    within = 2 if match["kind"].endswith("samplers") else int(match["j"])
    number = 3 * int(match["i"]) + within
    return f"IN{number + 1:02}" if match["way"] == "down" else f"OUT{number:02}"


@dataclass(frozen=True)
class BlockWeights:
    """text: as the user wrote it. weights: by block. length: that of the list; 0 where blocks were named."""

    text: str
    weights: Mapping[str, float]
    length: int = 0

    @classmethod
    def parse(cls, text: str) -> BlockWeights:
        """From "1,0,0,…", from "OUT=0,IN05=0.5", or from one number for all. Raises UserError."""
        items = [item.strip() for item in text.split(",")]
        if any("=" in item for item in items):
            weights = dict.fromkeys(_NAMES, 1.0)
            for item in items:
                name, _, value = item.partition("=")
                weights |= dict.fromkeys(_named(name.strip(), text), _number(value, text))
            return cls(text, weights)
        values = [_number(item, text) for item in items]
        if len(values) == 1:
            return cls(text, dict.fromkeys(_NAMES, values[0]))
        if len(values) not in LISTS:
            raise UserError(
                f"--lbw {text}: {len(values)} numbers; there are lists of 17 or 26 for SD 1.x and 2.x, and of 12 or 20 "
                "for SDXL"
            )
        return cls(text, dict(zip(LISTS[len(values)], values, strict=True)), len(values))

    def of(self, layer: str) -> float:
        """The weight of a layer, by its name in files. `UserError` for a block that the list has no number for."""
        block = block_of(layer)
        if block not in self.weights:
            full = {12: 20, 17: 26}.get(self.length)
            words = f"; the list of {full} has them" if full and block in LISTS[full] else ""
            raise UserError(
                f"--lbw {self.text}: the file has layers in {block}, as {layer}, which a list of {self.length} has no "
                f"number for{words}"
            )
        return self.weights[block]

    def check(self, version: str, file: str) -> None:
        """`UserError` for a list of another family than that of the file, whose `ss_base_model_version` this is."""
        if not version or version == "None" or not self.length:
            return
        lengths = _SDXL if version.startswith("sdxl") else _SD if version.startswith("sd_v") else ()
        if lengths and self.length not in lengths:
            words = " or ".join(map(str, lengths))
            raise UserError(
                f"--lbw {self.text}: a list of {self.length}, and {file}, of {version}, takes {words} numbers"
            )


def _named(name: str, text: str) -> tuple[str, ...]:
    if name in _GROUPS:
        return _GROUPS[name]
    if name not in _NAMES:
        known = [*_NAMES, *_GROUPS]
        words = f"'{name}' is no block{did_you_mean(name, known)}"
        raise UserError(f"--lbw {text}: {words}; there are BASE, IN00 … IN11, MID, OUT00 … OUT11, and IN, OUT, ALL")
    return (name,)


def _number(value: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--lbw {text}: '{value}' is no weight")
    return number
