"""The blocks of a UNet as kohya numbers them, and settings that differ by block."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from library.errors import UserError

if TYPE_CHECKING:
    from networks.network import Site

Value = TypeVar("Value", int, float)


@dataclass(frozen=True)
class Blocks:
    """How many blocks there are on the way down, in the middle and up, and `ends` more at either end.

    Those at the ends are the embeddings and the output, in which nothing is adapted: block weights leave them out,
    block dims name them.
    """

    down: int
    mid: int
    up: int
    ends: int

    @property
    def count(self) -> int:
        return self.ends + self.down + self.mid + self.up + self.ends


SD = Blocks(12, 1, 12, ends=0)  # 1.x and 2.x; nothing in block 0 is adapted
SDXL = Blocks(9, 3, 9, ends=1)  # 0 embeddings, 1 … 9 down, 10 … 12 middle, 13 … 21 up, 22 output

_RANKS_BY_BLOCK = frozenset(("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"))
BY_BLOCK = _RANKS_BY_BLOCK | {"down_lr_weight", "mid_lr_weight", "up_lr_weight"}
"""Settings of a network that have a number for each block: only its layers tell how many these are."""

# The names in files tell which it is: those of SDXL are the original layout's.
_BLOCK = re.compile(
    r".*?(?P<way>down|up)_blocks_(?P<i>\d+)_(?P<kind>resnets|attentions|(?:up|down)samplers)_(?P<j>\d+)_.*"
)
_ORIGINAL = re.compile(r".*?_(?P<way>input|output)_blocks_(?P<i>\d+)_.*|.*?_middle_block_(?P<j>\d+)_.*")
_LAYER = re.compile(r".*?_layers_(?P<i>\d+)_.*")


def blocks_of(sites: Iterable[Site]) -> Blocks:
    """The numbering that these layers of one model follow."""
    return SDXL if any(site.part == "unet" and _ORIGINAL.fullmatch(site.name) for site in sites) else SD


def block_of(site: Site) -> int | None:
    """kohya's number of the UNet block that a layer lies in; None elsewhere.

    Of SD 1 … 11 down, 12 middle, 13 … 24 up. Of SDXL 2 … 9 down (input_blocks.0 is the first convolution, which is not
    adapted), 10 … 12 middle, 13 … 21 up.
    """
    if site.part != "unet":
        return None
    if match := _BLOCK.fullmatch(site.name):
        within = 2 if match["kind"].endswith("samplers") else int(match["j"])
        return (1 if match["way"] == "down" else SD.down + SD.mid) + 3 * int(match["i"]) + within
    if match := _ORIGINAL.fullmatch(site.name):
        if match["j"] is not None:
            return SDXL.ends + SDXL.down + int(match["j"])
        before = {"input": SDXL.ends, "output": SDXL.ends + SDXL.down + SDXL.mid}[match["way"]]
        return before + int(match["i"])
    return SD.down if "_mid_block_" in site.name else None


def depth_of(site: Site) -> int | None:
    """A UNet's block or a text encoder's layer: the larger, the farther from the input."""
    if site.part == "unet":
        return block_of(site)
    match = _LAYER.fullmatch(site.name)
    return int(match["i"]) if match else None


@dataclass(frozen=True)
class Ranks:
    """Rank and alpha of a kind of layer, 0 for none: the same everywhere, or in the UNet one for each block."""

    rank: int
    alpha: float
    by_block: tuple[tuple[int, float], ...] | None = None

    @property
    def any(self) -> bool:
        return bool(self.rank or self.by_block)

    def of(self, site: Site) -> tuple[int, float]:
        block = block_of(site)
        if self.by_block is None or block is None:
            return self.rank, self.alpha
        return self.by_block[block]


def ranks(
    rank: int, alpha: float, *, dims: str | None, alphas: str | None, blocks: Blocks, names: tuple[str, str]
) -> Ranks:
    """From the words of `block_dims` and `block_alphas` (or the convolutions': `names`), one number for each block.

    `rank` and `alpha` hold where these say nothing, and outside of the UNet. Raises UserError.
    """
    if dims is None and alphas is None:
        return Ranks(rank, alpha)
    of_dims = (rank,) * blocks.count if dims is None else _numbers(names[0], dims, int, blocks)
    of_alphas = (alpha,) * blocks.count if alphas is None else _numbers(names[1], alphas, float, blocks)
    if not any(of_dims):
        raise UserError(f"{names[0]}: every block has rank 0, so nothing is adapted")
    return Ranks(rank, alpha, tuple(zip(of_dims, of_alphas, strict=True)))


def _numbers(name: str, text: str, read: Callable[[str], Value], blocks: Blocks) -> tuple[Value, ...]:
    words = [word.strip() for word in text.split(",")]
    if len(words) != blocks.count:
        raise UserError(f"{name}: {len(words)} numbers for this model's {blocks.count} blocks: {_layout(blocks)}")
    try:
        numbers = tuple(read(word) for word in words)
    except ValueError:
        raise UserError(f"{name}: {text} are not {blocks.count} numbers, such as {'4,' * 3}…") from None
    if min(numbers) < 0:
        raise UserError(f"{name}: {min(numbers):g} is not in question, it must be 0 or more")
    return numbers


def _layout(blocks: Blocks) -> str:
    parts = [f"{blocks.down} down, {blocks.mid} middle, {blocks.up} up"]
    return ", ".join(["1 embeddings", *parts, "1 output"] if blocks.ends else parts)
