"""Ranks and alphas of a network's layers: the same everywhere, or one for each block."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from library.errors import UserError
from networks.layers import compiled, first_match, pattern_numbers, preset_of

if TYPE_CHECKING:
    from library.models.blocks import Blocks
    from networks.settings import Asked, RankSizes
    from networks.sites import Site

Value = TypeVar("Value", int, float)


@dataclass(frozen=True)
class Ranks:
    """Rank and alpha of a kind of layer, 0 for none: the same everywhere, or one for each numbered block."""

    rank: int
    alpha: float
    by_block: tuple[tuple[int, float], ...] | None = None

    @property
    def any(self) -> bool:
        return bool(self.rank or self.by_block)

    def of(self, site: Site) -> tuple[int, float]:
        """(rank, alpha) of the adapter on this layer."""
        if self.by_block is None or site.block is None:
            return self.rank, self.alpha
        return self.by_block[site.block]


@lru_cache(maxsize=8)  # asked for each layer
def ranks_of(asked: Asked, sizes: RankSizes, blocks: Blocks | None) -> tuple[Ranks, Ranks]:
    """Those of Linear and 1x1 convolutions, and those of wider kernels. Raises UserError.

    Linear and 1x1 convolutions take `--network_dim` (None: 4) and `--network_alpha` (None: 1; 0: the rank), wider
    kernels `conv_dim` (None: not adapted) and `conv_alpha` (None: 1; 0: the rank); blocks may have their own. Where a
    preset takes wider kernels, they have the others' rank and alpha unless these say otherwise, as LyCORIS has it; with
    a preset `conv_dim` may be 0: none.
    """
    rank = _rank("network_dim", 4 if asked.dim is None else asked.dim)
    alpha = 1.0 if asked.alpha is None else asked.alpha
    usual = _by_block(
        rank,
        alpha,
        dims=sizes.block_dims,
        alphas=sizes.block_alphas,
        blocks=blocks,
        names=("block_dims", "block_alphas"),
    )
    preset = preset_of(sizes.preset)
    if preset is not None and sizes.conv_dim == 0 and sizes.conv_block_dims is None:
        return usual, Ranks(0, 0.0)
    as_others = preset is not None and preset.conv == "all"
    dims, alphas = sizes.conv_block_dims, sizes.conv_block_alphas
    if as_others:
        dims = sizes.block_dims if sizes.conv_dim is None and dims is None else dims
        alphas = sizes.block_alphas if sizes.conv_alpha is None and alphas is None else alphas
    conv_rank, conv_alpha = (rank, alpha) if as_others else (0, 1.0)
    if sizes.conv_dim is not None:
        conv_rank = _rank("conv_dim", sizes.conv_dim)
    if sizes.conv_alpha is not None:
        conv_alpha = sizes.conv_alpha
        if conv_alpha < 0:
            raise UserError(f"conv_alpha: {conv_alpha:g} is below 0")
    names = ("conv_block_dims", "conv_block_alphas")
    spatial = _by_block(conv_rank, conv_alpha, dims=dims, alphas=alphas, blocks=blocks, names=names)
    return usual, spatial


def _rank(name: str, rank: int) -> int:
    if rank < 1:
        raise UserError(f"{name}: {rank} is not a rank, it must be 1 or more")
    return int(rank)


def _by_block(
    rank: int, alpha: float, *, dims: str | None, alphas: str | None, blocks: Blocks | None, names: tuple[str, str]
) -> Ranks:
    """From the words of `block_dims` and `block_alphas` (or the convolutions': `names`), one number for each block.

    `rank` and `alpha` hold where these say nothing, and outside of the blocks.
    """
    if dims is None and alphas is None:
        return Ranks(rank, alpha)
    if blocks is None:
        raise UserError(f"{names[dims is None]}: this model has no numbered blocks")
    of_dims = (rank,) * blocks.count if dims is None else _numbers(names[0], dims, int, blocks)
    of_alphas = (alpha,) * blocks.count if alphas is None else _numbers(names[1], alphas, float, blocks)
    if not any(of_dims):
        raise UserError(f"{names[0]}: every block has rank 0, so nothing is adapted")
    return Ranks(rank, alpha, tuple(zip(of_dims, of_alphas, strict=True)))


def _numbers(name: str, text: str, read: Callable[[str], Value], blocks: Blocks) -> tuple[Value, ...]:
    words = [word.strip() for word in text.split(",")]
    if len(words) != blocks.count:
        raise UserError(f"{name}: {len(words)} numbers for this model's {blocks.count} blocks: {blocks.layout}")
    try:
        numbers = tuple(read(word) for word in words)
    except ValueError:
        raise UserError(f"{name}: {text} are not {blocks.count} numbers, such as {'4,' * 3}…") from None
    if min(numbers) < 0:
        raise UserError(f"{name}: {min(numbers):g} is out of range, it must be 0 or more")
    return numbers


@lru_cache(maxsize=8)  # asked for each layer
def reg_dims(text: str | None) -> tuple[tuple[re.Pattern[str], int], ...]:
    """Regular expressions with their ranks, from `network_reg_dims`. Raises UserError."""
    found = pattern_numbers("network_reg_dims", text, "rank")
    for regex, rank in found:
        if not rank.is_integer():
            raise UserError(f"network_reg_dims: {regex.pattern}={rank:g}: a rank is a whole number")
    return tuple((regex, _rank("network_reg_dims", int(rank))) for regex, rank in found)


def reg_dim(site: Site, text: str | None) -> int | None:
    """The rank of the first pattern of `network_reg_dims` that matches the layer; None if none does."""
    place = first_match(site, reg_dims(text))
    return None if place is None else reg_dims(text)[place][1]


def check_reg_dims(text: str | None, sites: Sequence[Site]) -> None:
    """`UserError` for a pattern that matches no layer."""
    for regex, _ in reg_dims(text):
        compiled("network_reg_dims", regex.pattern, sites)
