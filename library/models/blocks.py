"""The numbered blocks of a denoiser, by which rates and ranks of an adapter can differ.

The numbers are kohya's: users write lists with one number a block. A family has a `Blocks` for its denoiser.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """sections: the number of blocks in each section, from the input to the output, by the section's name in options.

    ends: the number of further blocks at each end, the embeddings and the output, in which nothing is adapted: lists of
    block weights leave them out, lists of block dims include them. number: a layer's block, from its dotted name in
    adapter files; None for a layer outside of all blocks. titles: the sections' names in messages, if they differ.
    """

    sections: tuple[tuple[str, int], ...]
    ends: int
    number: Callable[[str], int | None]
    titles: tuple[tuple[str, str], ...] = ()

    @property
    def count(self) -> int:
        """All blocks, those at the ends too."""
        return self.ends + sum(count for _, count in self.sections) + self.ends

    def numbers_in(self, section: str) -> range:
        """The numbers of a section's blocks; empty for one that there is not."""
        first = self.ends
        for name, count in self.sections:
            if name == section:
                return range(first, first + count)
            first += count
        return range(0)

    @property
    def layout(self) -> str:
        """For messages: "12 down, 1 middle, 12 up"."""
        titles = dict(self.titles)
        parts = [f"{count} {titles.get(name, name)}" for name, count in self.sections]
        ends = (f"{self.ends} embeddings", f"{self.ends} output")
        return ", ".join([ends[0], *parts, ends[1]] if self.ends else parts)


_SD_DOWN, _SD_MIDDLE = 12, 1
_BLOCK = re.compile(
    r"(?P<way>down|up)_blocks\.(?P<i>\d+)\.(?P<kind>resnets|attentions|(?:up|down)samplers)\.(?P<j>\d+)\..*"
)
_XL_ENDS, _XL_DOWN, _XL_MIDDLE = 1, 9, 3
_ORIGINAL = re.compile(r"(?P<way>input|output)_blocks\.(?P<i>\d+)\..*|middle_block\.(?P<j>\d+)\..*")


def _in_diffusers_names(name: str) -> int | None:
    """1 … 11 down, 12 middle, 13 … 24 up; nothing in block 0 is adapted."""
    if match := _BLOCK.fullmatch(name):
        within = 2 if match["kind"].endswith("samplers") else int(match["j"])
        return (1 if match["way"] == "down" else _SD_DOWN + _SD_MIDDLE) + 3 * int(match["i"]) + within
    return _SD_DOWN if name.startswith("mid_block.") else None


def _in_original_names(name: str) -> int | None:
    """2 … 9 down (input_blocks.0 is the first convolution, which is not adapted), 10 … 12 middle, 13 … 21 up."""
    match = _ORIGINAL.fullmatch(name)
    if match is None:
        return None
    if match["j"] is not None:
        return _XL_ENDS + _XL_DOWN + int(match["j"])
    before = {"input": _XL_ENDS, "output": _XL_ENDS + _XL_DOWN + _XL_MIDDLE}[match["way"]]
    return before + int(match["i"])


_TITLES = (("mid", "middle"),)
SD = Blocks((("down", _SD_DOWN), ("mid", _SD_MIDDLE), ("up", 12)), 0, _in_diffusers_names, _TITLES)
"""1.x and 2.x, whose adapter files have diffusers' names."""
SDXL = Blocks((("down", _XL_DOWN), ("mid", _XL_MIDDLE), ("up", 9)), _XL_ENDS, _in_original_names, _TITLES)
"""0 embeddings, 1 … 9 down, 10 … 12 middle, 13 … 21 up, 22 output; its adapter files have the original names."""
