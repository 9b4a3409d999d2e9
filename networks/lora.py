"""LoRA: a low-rank pair beside each layer, `W x + multiplier * alpha / r * up(down(x))` (Hu et al. 2021).

`--network_module networks.lora`. On convolutions, `down` has the layer's kernel and stride and `up` is 1x1; with
`use_tucker` wide kernels have a core `mid` with the kernel between a 1x1 `down` and `up` (LyCORIS' LoCon).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.quantization.frozen import weight_of
from networks.adapter import Adapter, Holder, Shape, generator_for
from networks.magnitude import DORA_SCALE, Axis, Form, WithMagnitude, low_rank_squares
from networks.settings import RankSettings as Settings
from networks.settings import RankSizes
from networks.settings import TuckerSizes as Sizes
from networks.sites import Site

DOWN, MID, UP = "lora_down.weight", "lora_mid.weight", "lora_up.weight"


class LoRA(WithMagnitude):
    """The pair on one layer. `up` starts at 0, so that a new adapter changes nothing."""

    NAME = "lora"
    NOUN = "plain LoRA"
    NAMES: ClassVar[tuple[str, ...]] = (DOWN, MID, UP, DORA_SCALE)
    READS: ClassVar[tuple[str, ...]] = ("lora", "tucker")
    RAISED = UP  # Hayou, Ghosh, Yu 2024
    ROLES = MappingProxyType({DOWN: "down", UP: "up"})
    SETTINGS: ClassVar[type[Settings]] = Settings
    SIZES: ClassVar[type[RankSizes]] = Sizes

    lora_down: Holder
    lora_mid: Holder
    lora_up: Holder

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """down (r, in, …), up (out, r, 1 …); with a core mid (r, r, height, width), and down (r, in, 1, 1)."""
        if not self.form.tucker:
            return pair_shapes(weight, self.rank)
        down, up = pair_shapes((*weight[:2], 1, 1), self.rank).values()
        return {DOWN: down, MID: (self.rank, self.rank, *weight[2:]), UP: up}

    @classmethod
    def lacking(cls, names: Collection[str]) -> str | None:
        return next((name for name in (DOWN, UP) if name not in names), None)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> Form:
        return replace(super().form_in(site, tensors), tucker=MID in tensors)

    def initialise(self) -> None:
        """`down` uniform within 1 / sqrt(fan in), as Microsoft's and kohya's."""
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=generator_for(self, "lora_down"))
        if self.form.tucker:
            nn.init.kaiming_uniform_(self.lora_mid.weight, a=math.sqrt(5), generator=generator_for(self, "lora_mid"))
        nn.init.zeros_(self.lora_up.weight)

    @property
    def project(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
        """The layer's own operation for `down` (or the core), and that of a 1x1 layer for `up`."""
        return projections(self.site.module)

    def share(self, x: Tensor) -> Tensor:
        """Down, dropout, up. The weights take the dtype of `x`, as `Adapter.share` has it."""
        project_down, project_up = self.project
        down, up = self.factors()
        if self.form.tucker:
            hidden = project_down(F.conv2d(x, down.to(x.dtype)), self.lora_mid.weight.to(x.dtype))
        else:
            hidden = project_down(x, down.to(x.dtype))
        if self.drops and self.training:
            hidden = self._drop(hidden)
        # scaled while it has r channels, the output has hundreds or thousands of them
        return project_up(hidden * self.factor, up.to(x.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """down and up as the forward uses them, in the shapes of `pair_shapes`."""
        return self.lora_down.weight, self.lora_up.weight

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return tensors[DOWN].shape[0]

    @classmethod
    def product_of(cls, tensors: Mapping[str, Tensor], weight: Shape) -> Tensor:
        """up @ down, with down as [r, in * k * k] and up as [out, r]."""
        down, up = cls.matrices(tensors, weight)
        return (up @ down).view(tuple(weight))

    @classmethod
    def matrices(cls, tensors: Mapping[str, Tensor], weight: Shape) -> tuple[Tensor, Tensor]:
        """down as [r, in * k * k], with the core if there is one, and up as [out, r], fp32."""
        down, up = tensors[DOWN].float().flatten(1), tensors[UP].float().flatten(1)
        if (mid := tensors.get(MID)) is not None:
            down = torch.einsum("pqhw,qi->pihw", mid.float(), down).flatten(1)
        return down, up

    @classmethod
    def from_delta(cls, delta: Tensor, rank: int) -> dict[str, Tensor]:
        """The tensors of this rank whose delta is nearest to `delta` in the Frobenius norm (Eckart, Young 1936).

        fp32, alpha = rank; the singular values are shared out evenly between down and up.
        """
        left, values, right = torch.linalg.svd(delta.float().flatten(1), full_matrices=False)
        root = values[:rank].sqrt()
        shapes = pair_shapes(delta.shape, len(root))
        pair = {DOWN: root[:, None] * right[:rank], UP: left[:, :rank] * root}
        tensors = {name: tensor.reshape(tuple(shapes[name])).contiguous() for name, tensor in pair.items()}
        return {"alpha": torch.tensor(float(len(root))), **tensors}

    def _pair(self) -> tuple[Tensor, Tensor]:
        return self.matrices(self.tensors(), self.site.module.weight.shape)

    def squares_more(self, axis: Axis) -> Tensor:
        down, up = self._pair()
        weight = weight_of(self.site.module)
        return low_rank_squares(weight, down.view(-1, *weight.shape[1:]), up, self.scale, axis)

    def norm(self) -> Tensor:
        """Without forming the product: |UD|² = tr((UᵀU)(DDᵀ)), two r x r matrices."""
        if self.form.axis is not None:
            return super().norm()
        down, up = self._pair()
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt() * abs(self.scale)

    @classmethod
    def norms(cls, adapters: Sequence[Adapter]) -> list[Tensor]:
        """On a GPU pairs of the same shapes in one batch: a UNet has hundreds of them and a dozen different shapes."""
        if any(isinstance(adapter, LoRA) and adapter.form.axis is not None for adapter in adapters) or all(
            parameter.device.type == "cpu" for adapter in adapters for parameter in adapter.parameters()
        ):
            return super().norms(adapters)  # stacking would cost more than hundreds of small products
        return cls._batched_norms(adapters)

    @staticmethod
    def _batched_norms(adapters: Sequence[Adapter]) -> list[Tensor]:
        norms: dict[int, Tensor] = {}
        shapes: dict[tuple[torch.Size, torch.Size], list[int]] = {}
        pairs = [adapter._pair() for adapter in adapters if isinstance(adapter, LoRA)]
        for index, (down, up) in enumerate(pairs):
            shapes.setdefault((down.shape, up.shape), []).append(index)
        for places in shapes.values():
            downs = torch.stack([pairs[index][0] for index in places])
            ups = torch.stack([pairs[index][1] for index in places])
            squares = ((ups.mT @ ups) * (downs @ downs.mT)).sum((1, 2)).clamp(min=0)
            norms |= zip(places, squares.sqrt().unbind(), strict=True)
        return [norms[index] * abs(adapter.scale) for index, adapter in enumerate(adapters)]

    def pairs(self) -> list[tuple[str, str]]:
        """None with a core between the two."""
        return [] if self.form.tucker else super().pairs()

    def is_zero(self) -> bool:
        """Whether a factor is zero: `up` is in a new adapter. Two factors with a zero product count as something."""
        if self.form.axis is not None:
            return super().is_zero()
        return not (self.lora_up.weight.any() and self.lora_down.weight.any())

    def shrink(self, ratio: float) -> None:
        self.lora_down.weight.mul_(ratio**0.5)
        self.lora_up.weight.mul_(ratio**0.5)


def projections(layer: nn.Module) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The operation of a Linear or a Conv2d, and that of a 1x1 layer, as functions of an input and a weight."""
    if not isinstance(layer, nn.Conv2d):
        return F.linear, F.linear
    shape = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return functools.partial(F.conv2d, **shape), F.conv2d


def pair_shapes(weight: Shape, rank: int) -> dict[str, Shape]:
    """down (r, in, …), up (out, r, 1 …), for a layer whose weight has the shape `weight`."""
    return {DOWN: (rank, *weight[1:]), UP: (weight[0], rank, *(1 for _ in weight[2:]))}
