"""BOFT: rotates the outputs of a layer in stages of blocks, which mix ever farther ones.

`--network_module networks.boft` (Liu et al. 2024, arXiv 2311.06243). The stages are those of a butterfly, as in a fast
Fourier transform, each with OFT's rotations (networks/oft.py) between outputs that lie 2^stage half blocks apart: a
full orthogonal matrix from few numbers. With the multiplier m each stage is `I + m * (R - I)`. The tensors are those of
LyCORIS' boft.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.quantization.frozen import weight_of
from networks.adapter import Shape, product
from networks.oft import ALPHA, BLOCKS, OFT, RESCALE, Form, RotationSizes, checked_constraint, turn_of
from networks.settings import Asked, LayerSizes, RateSettings
from networks.settings import RateSettings as Settings
from networks.sites import Site, find_sites

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.models.blocks import Blocks
    from library.models.family import AdapterTargets

_USUAL_SIZE = 4
_HANDY = 64  # the largest size of a product of stages that is worth it


@dataclass(frozen=True, kw_only=True)
class Sizes(RotationSizes):
    """`--network_dim` is the largest size of a block, conv_dim that on k x k convolutions; without it the ResNet blocks
    are left out."""

    conv_dim: int | None = None


class BOFT(OFT):
    """The stages of one layer."""

    NAME = "boft"
    NOUN = "BOFT"
    SETTINGS = Settings
    SIZES = Sizes

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """oft_blocks (stages, blocks, size, size), rescale (out, 1, …)."""
        shapes = super().shapes(weight)
        return shapes | {BLOCKS: (self.form.stages, *shapes[BLOCKS])}

    @classmethod
    def sites(cls, targets: Sequence[AdapterTargets], asked: Asked, sizes: LayerSizes) -> list[Site]:
        assert isinstance(sizes, Sizes)
        return find_sites(targets, conv=bool(sizes.conv_dim))

    @classmethod
    def new(
        cls, site: Site, asked: Asked, sizes: LayerSizes, settings: RateSettings, blocks: Blocks | None
    ) -> Self | None:
        assert isinstance(sizes, Sizes)
        cls.refuse_without(asked, "alpha", "dropout")
        option, largest = "network_dim", _USUAL_SIZE if asked.dim is None else asked.dim
        if site.spatial and (sizes.conv_dim is not None or sizes.preset is None):
            option, largest = "conv_dim", sizes.conv_dim or 0
        if not largest:
            return None
        size, count = _cut(site, largest, option)
        form = Form(count, size, sizes.rescaled, stages=count.bit_length())
        return cls(site, form=form, constraint=checked_constraint(sizes.constraint or 0.0), seed=asked.seed)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> Form:
        out, (stages, count, size, _) = site.module.weight.shape[0], tensors[BLOCKS].shape
        if count * size != out or size % 2 or count % (1 << (stages - 1)):
            raise UserError(
                f"{site.name}: {stages} stages of {count} blocks of {size} x {size} in the file, for {out} outputs"
            )
        return Form(count, size, RESCALE in tensors, stages=stages)

    # -- on the layer

    def forward(self, x: Tensor) -> Tensor:
        """The stages turn the layer's output, or its weight where that has fewer columns than the output has places."""
        if self.is_off():
            return self.base_forward(x)
        layer, convolution = self.site.module, isinstance(self.site.module, nn.Conv2d)
        change = turn_of(self.oft_blocks, self.constraint) * self.multiplier
        places, columns = x.numel() // x.shape[1 if convolution else -1], layer.weight[0].numel()
        if (
            self.alone and 2 * places > columns
        ):  # twice, since the output's gradient is taken anyway, and the weight's is not
            return self._with_weight(x, change)
        base = self.base_forward(x)
        channels = (-1, 1, 1) if convolution else (-1,)
        moved = base if layer.bias is None else base - layer.bias.to(base.dtype).view(channels)
        if convolution:
            moved = moved.movedim(1, 0)
            more = self._more(moved.flatten(1), change).view(moved.shape).movedim(0, 1)
        else:
            more = self._more(moved.reshape(-1, moved.shape[-1]).T, change).T.reshape(base.shape)
        return base + more

    def _with_weight(self, x: Tensor, change: Tensor) -> Tensor:
        """As a full difference does it: one product in fp32, two beside a weight in 16 or 8 bits."""
        layer = self.site.module
        weight = weight_of(layer).float()
        more = self._more(weight.flatten(1), change).view(weight.shape)
        if layer.weight.dtype == torch.float32:
            return product(layer, x, weight + more, layer.bias)
        return product(layer, x, more.to(x.dtype), None).add_(self.base_forward(x))

    def _more(self, rows: Tensor, change: Tensor) -> Tensor:
        """By how much the stages, and what is behind them, change these rows, [out, columns]."""
        turned = through_stages(rows, change)
        if self.form.rescaled:
            turned = turned * (1 + (self.rescale.view(-1, 1) - 1) * self.multiplier).to(rows.dtype)
        return turned - rows

    # -- its weights

    @classmethod
    def effective_weight(cls, weight: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        rows = weight.float().flatten(1)
        change = turn_of(tensors[BLOCKS], float(tensors.get(ALPHA, 0.0))) * multiplier
        turned = through_stages(rows, change.to(weight.device))
        if (rescale := tensors.get(RESCALE)) is not None:
            turned = turned * (1 + (rescale.to(weight.device, torch.float32).view(-1, 1) - 1) * multiplier)
        return turned.view(weight.shape)


def through_stages(rows: Tensor, change: Tensor) -> Tensor:
    """The rows, [out, columns], with `I + change` of each stage applied, [stages, blocks, size, size].

    In stage j a block takes half its rows from one place and half from 2^j half blocks farther. A few stages act within
    groups of some 2^n half blocks, so that one product with their product takes the place of several.
    """
    stages, count, size, _ = change.shape
    half, columns = size // 2, rows.shape[-1]
    # files have a block's rows in turns from the two places; here they are one half after the other
    change = change.view(stages, count, half, 2, half, 2).permute(0, 1, 3, 2, 5, 4).reshape(change.shape)
    together = max(1, (_HANDY // half).bit_length() - 1)
    for first in range(0, stages, together):
        group = _together(change[first : first + together], first)
        apart, wide = 2**first, group.shape[-1]
        cut = rows.reshape(-1, wide // half, apart, half, columns).transpose(1, 2).reshape(-1, wide, columns)
        turned = torch.baddbmm(cut, group.to(rows.dtype), cut)
        rows = turned.view(-1, apart, wide // half, half, columns).transpose(1, 2)
    return rows.reshape(count * size, columns)


def _together(change: Tensor, first: int) -> Tensor:
    """The product of successive stages from `first` on, [stages, blocks, size, size], less I: [groups, wide, wide].

    2^first groups lie in turns."""
    stages, _, size, _ = change.shape
    wide, apart = size // 2 * 2**stages, 2**first
    unit = torch.eye(wide, device=change.device)
    whole = unit.expand(change.shape[1] * size // wide, wide, wide)
    for stage, blocks in enumerate(change):
        far, near = 2 ** (stages - 1 - stage), 2**stage
        own = blocks.view(-1, far, near, apart, size, size).permute(0, 3, 1, 2, 4, 5).reshape(-1, size, size)
        cut = whole.reshape(-1, far, 2, near, size // 2, wide).transpose(2, 3).reshape(-1, size, wide)
        turned = torch.baddbmm(cut, own, cut).view(-1, far, near, 2, size // 2, wide)
        whole = turned.transpose(2, 3).reshape(-1, wide, wide)
    return whole - unit


def _cut(site: Site, largest: int, option: str) -> tuple[int, int]:
    """The size of a layer's blocks, and how many there are: the largest even size, not above `largest`, of which a
    power of two fill its outputs. Raises UserError."""
    if largest < 1:
        raise UserError(f"{option}: {largest} is not positive")
    out = site.module.weight.shape[0]
    fitting = [size for size in range(2, out + 1, 2) if out % size == 0 and (out // size).bit_count() == 1]
    if not fitting or fitting[0] > largest:
        sizes = f"; {', '.join(map(str, fitting[:4]))} do" if fitting else ""
        raise UserError(
            f"{site.name}: no even block size of at most {largest} ({option}) goes 1, 2, 4, 8 … times into its "
            f"{out} outputs{sizes}"
        )
    size = max(one for one in fitting if one <= largest)
    return size, out // size
