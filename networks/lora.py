"""LoRA: a low-rank pair beside each layer, `W x + multiplier * alpha / r * up(down(x))` (Hu et al. 2021).

`--network_module networks.lora`. On convolutions, `down` has the layer's kernel and stride and `up` is 1x1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.adapter import Adapter, Holder, Shape, WithRank, generator_for
from networks.settings import RankSettings as Settings
from networks.settings import RankSizes as Sizes

DOWN, UP = "lora_down.weight", "lora_up.weight"


class LoRA(WithRank):
    """The pair on one layer. `up` starts at 0, so that a new adapter changes nothing."""

    NAME = "lora"
    NOUN = "plain LoRA"
    MARK = DOWN
    RAISED = UP  # Hayou, Ghosh, Yu 2024
    ROLES = MappingProxyType({DOWN: "down", UP: "up"})
    SETTINGS = Settings
    SIZES = Sizes

    lora_down: Holder
    lora_up: Holder

    @classmethod
    def shapes(cls, weight: Shape, rank: int) -> dict[str, Shape]:
        """down (r, in, …), up (out, r, 1 …)."""
        return {DOWN: (rank, *weight[1:]), UP: (weight[0], rank, *(1 for _ in weight[2:]))}

    def initialise(self) -> None:
        """`down` uniform within 1 / sqrt(fan in), as Microsoft's and kohya's."""
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=generator_for(self, "lora_down"))
        nn.init.zeros_(self.lora_up.weight)

    @functools.cached_property
    def _project(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
        """The layer's own operation for `down`, and that of a 1x1 layer for `up`."""
        layer = self.site.module
        if not isinstance(layer, nn.Conv2d):
            return F.linear, F.linear
        shape = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        return functools.partial(F.conv2d, **shape), F.conv2d

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for `x`, and the adapter's share.

        The weights take the dtype of `x`, not the other way round: they are small and `x` is not. Where autocast is on
        it has the last word; where it is off, a base in bf16 runs with adapters in fp32.
        """
        if self.factor == 0 or (self.drops and self.training and self._left_out()):
            return self.base_forward(x)
        project_down, project_up = self._project
        hidden = project_down(x, self.lora_down.weight.to(x.dtype))
        if self.drops and self.training:
            hidden = self._drop(hidden)
        # scaled while it has r channels, added in place: the output has hundreds or thousands of them
        share = project_up(hidden * self.factor, self.lora_up.weight.to(x.dtype))
        return share.add_(self.base_forward(x))

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return tensors[DOWN].shape[0]

    @classmethod
    def product_of(cls, tensors: Mapping[str, Tensor], weight: Shape) -> Tensor:
        """up @ down, with down as [r, in * k * k] and up as [out, r]."""
        down, up = _matrices(tensors[DOWN], tensors[UP])
        return (up @ down).view(tuple(weight))

    @classmethod
    def from_delta(cls, delta: Tensor, rank: int) -> dict[str, Tensor]:
        """The tensors of this rank whose delta is nearest to `delta` in the Frobenius norm (Eckart, Young 1936).

        fp32, alpha = rank; the singular values are shared out evenly between down and up.
        """
        left, values, right = torch.linalg.svd(delta.float().flatten(1), full_matrices=False)
        root = values[:rank].sqrt()
        shapes = cls.shapes(delta.shape, len(root))
        pair = {DOWN: root[:, None] * right[:rank], UP: left[:, :rank] * root}
        tensors = {name: tensor.reshape(tuple(shapes[name])).contiguous() for name, tensor in pair.items()}
        return {"alpha": torch.tensor(float(len(root))), **tensors}

    def _pair(self) -> tuple[Tensor, Tensor]:
        return _matrices(self.lora_down.weight, self.lora_up.weight)

    def norm(self) -> Tensor:
        """Without forming the product: |UD|² = tr((UᵀU)(DDᵀ)), two r x r matrices."""
        down, up = self._pair()
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt() * abs(self.scale)

    @classmethod
    def norms(cls, adapters: Sequence[Adapter]) -> list[Tensor]:
        """On a GPU pairs of the same shapes in one batch: a UNet has hundreds of them and a dozen different shapes."""
        if all(parameter.device.type == "cpu" for adapter in adapters for parameter in adapter.parameters()):
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

    def is_zero(self) -> bool:
        """Whether a factor is zero: `up` is in a new adapter. Two factors with a zero product count as something."""
        return not (self.lora_up.weight.any() and self.lora_down.weight.any())

    def rescale(self, ratio: float) -> None:
        self.lora_down.weight.mul_(ratio**0.5)
        self.lora_up.weight.mul_(ratio**0.5)


def _matrices(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """down as [r, in * k * k] and up as [out, r], fp32."""
    return down.float().flatten(1), up.float().flatten(1)
