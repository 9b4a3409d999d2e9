"""GLoRA: a change of what goes into a layer and one of what comes out (Chavan et al. 2023, arXiv 2306.07967).

`W + multiplier * alpha / r * (W a1 a2 + b1 b2)`, as LyCORIS has it, without the paper's scales and biases.
`--network_module networks.glora`. On convolutions a1 a2 mixes the input channels, and b2 has the layer's kernel.

Such a file belongs to one base: the difference that it makes depends on W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from library.quantization.frozen import weight_of
from networks.adapter import Holder, Shape, WithRank, generator_for
from networks.lora import projections
from networks.settings import Asked, RateSettings
from networks.settings import RankSettings as Settings
from networks.settings import RankSizes as Sizes
from networks.sites import Site

A1, A2, B1, B2 = "a1.weight", "a2.weight", "b1.weight", "b2.weight"
_OLD = {A1: A2, A2: A1, B1: B2, B2: B1}  # names in the files of LyCORIS before 2.0, by those since


class GLoRA(WithRank):
    """The two pairs on one layer. a2 and b2 start at 0, so that a new adapter changes nothing.

    Dropout is that of kohya's LoRA, behind a2 and behind b2, each with random numbers of its own. (LyCORIS' rank
    dropout keeps what it should drop.)
    """

    NAME = "glora"
    NOUN = "GLoRA"
    NAMES = (A1, A2, B1, B2)
    RAISED = B1
    ROLES = MappingProxyType({B2: "down", B1: "up"})  # a1 a2 is multiplied by W: no product that adds to it
    SETTINGS = Settings
    SIZES = Sizes

    a1: Holder
    a2: Holder
    b1: Holder
    b2: Holder

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """a1 (in, r, 1 …), a2 (r, in, 1 …), b1 (out, r, 1 …), b2 (r, in, …)."""
        out, inputs, *kernel = weight
        ones = [1] * len(kernel)
        return {
            A1: (inputs, self.rank, *ones),
            A2: (self.rank, inputs, *ones),
            B1: (out, self.rank, *ones),
            B2: (self.rank, inputs, *kernel),
        }

    def initialise(self) -> None:
        for name, holder in ((A1, self.a1), (B1, self.b1)):
            nn.init.kaiming_uniform_(holder.weight, a=math.sqrt(5), generator=generator_for(self, name))
        nn.init.zeros_(self.a2.weight)
        nn.init.zeros_(self.b2.weight)

    def raises(self, name: str) -> bool:
        return name in (A1, B1)

    # -- on the layer

    def with_share(self, x: Tensor) -> Tensor:
        """The layer's own operation on x + a1 a2 x, so that no product with W is formed, and b1 b2 x."""
        own, pointwise = self._project
        moved = pointwise(self._dropped(pointwise(x, self.a2.weight.to(x.dtype))), self.a1.weight.to(x.dtype))
        added = pointwise(self._dropped(own(x, self.b2.weight.to(x.dtype))), self.b1.weight.to(x.dtype))
        return added.add_(self.base_forward(x + moved))

    @property
    def _project(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
        return projections(self.site.module)

    def _dropped(self, hidden: Tensor) -> Tensor:
        return (self._drop(hidden) if self.drops and self.training else hidden) * self.factor

    # -- weights

    @classmethod
    def as_in_file(cls, site: Site, tensors: Mapping[str, Tensor], asked: Asked, settings: RateSettings) -> GLoRA:
        return super().as_in_file(site, in_new_form(tensors, site.module.weight.shape), asked, settings)

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return len(tensors[A2])

    def completed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().completed(in_new_form(tensors, self.site.module.weight.shape))

    def export(self) -> dict[str, Tensor]:
        """In the new form; where that would be read as the old one, in the old one."""
        tensors = super().export()
        weight = self.site.module.weight.shape
        return _renamed(tensors) if in_new_form(tensors, weight)[A1] is not tensors[A1] else tensors

    def delta(self) -> Tensor:
        return self.delta_on(weight_of(self.site.module), self.tensors())

    @classmethod
    def needs_weight(cls, tensors: Mapping[str, Tensor]) -> bool:
        return True

    @classmethod
    def delta_on(cls, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The difference that a layer's tensors, as files have them, make to this weight; fp32, where it lies."""
        tensors = in_new_form(tensors, weight.shape)
        a1, a2, b1, b2 = (tensors[name].to(weight.device, torch.float32).flatten(1) for name in (A1, A2, B1, B2))
        rank = cls.rank_of(tensors)
        scale = cls.scale_for(float(tensors.get("alpha", rank)), rank)
        moved = torch.einsum("oi...,ir,rj->oj...", weight.float(), a1, a2)
        return (moved + (b1 @ b2).view(weight.shape)) * scale

    @classmethod
    def effective_weight(cls, weight: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        return weight.float() + cls.delta_on(weight, tensors) * multiplier

    def is_zero(self) -> bool:
        """Whether each pair has a factor that is zero: a2 and b2 are in a new adapter."""
        pairs = ((self.a1, self.a2), (self.b1, self.b2))
        return not any(first.weight.any() and second.weight.any() for first, second in pairs)

    def shrink(self, ratio: float) -> None:
        for holder in (self.a1, self.a2, self.b1, self.b2):
            holder.weight.mul_(ratio**0.5)


def in_new_form(tensors: Mapping[str, Tensor], weight: Shape) -> dict[str, Tensor]:
    """A layer's tensors in the names that LyCORIS has had since 2.0. Before, a1 and a2 had each other's, and b1 and b2.

    The form is told from the shapes by ComfyUI's rule: where both are possible, which takes a square weight and a rank
    of its size, it is the old one.
    """
    (a1, a2, b1, b2) = (tensors[name].shape for name in (A1, A2, B1, B2))
    is_old = b2[1] == b1[0] == a1[0] == a2[1]
    is_new = b2[0] == b1[1] == a1[1] == a2[0]
    if is_old and (not is_new or a2[0] == weight[0] == weight[1]):
        return _renamed(tensors)
    return dict(tensors)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_OLD.get(name, name): tensor for name, tensor in tensors.items()}
