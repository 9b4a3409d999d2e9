"""PiSSA: LoRA that trains the largest singular directions of a layer's weight (Meng et al. 2024, arXiv 2404.02948).

`--network_module networks.pissa`. B and A start as B0 and A0, the first r of W = U S Vᵀ as U √(S / s) and √(S / s) Vᵀ
with s = alpha / r. The layer computes W + s (B A - B0 A0), which is the paper's residual W - s B0 A0 plus s B A without
a change of W. As one product of rank 2r it is

    B A - B0 A0 = B (A - A0) + (B - B0) A0 = [B, B - B0] [A - A0; A0]

whose terms are exactly 0 at the start, in every precision, and need no large numbers to cancel. Files hold this product
as plain LoRA of rank 2r, which goes with the base as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from library.errors import UserError
from library.quantization.frozen import weight_of
from networks.adapter import Capability, Holder, Shape, generator_for
from networks.formats.own_form import OwnForm
from networks.lora import DOWN, UP, pair_shapes
from networks.magnitude import Form
from networks.settings import OwnFormSettings as Settings
from networks.settings import RankSettings, RankSizes
from networks.settings import RankSizes as Sizes
from networks.sites import Site

FROZEN_DOWN, FROZEN_UP = "pissa_down.weight", "pissa_up.weight"

_SMALL = 256  # singular values of a matrix for which all of them are computed
_POWER_STEPS = 8


@dataclass(frozen=True)
class PissaForm(Form):
    """from_base: whether it starts from the weight; False: from a file that is loaded next."""

    from_base: bool = True


class PiSSA(OwnForm):
    """`lora_down` and `lora_up` are trained, `pissa_down` and `pissa_up` are where they started."""

    NAME = "pissa"
    NOUN = "PiSSA in its own form"
    NAMES = (DOWN, UP, FROZEN_DOWN, FROZEN_UP)
    READS: ClassVar[tuple[str, ...]] = ("pissa",)
    FROZEN = (FROZEN_DOWN, FROZEN_UP)
    SETTINGS = Settings
    SIZES = Sizes

    form: PissaForm
    pissa_down: Holder
    pissa_up: Holder

    @classmethod
    def usual_form(cls) -> PissaForm:
        return PissaForm()

    def __init__(self, site: Site, **settings: Any) -> None:
        super().__init__(site, **settings)
        if self.form.from_base and not site.module.weight.is_meta:
            self._start()

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """Two pairs of down (r, in, …) and up (out, r, 1 …)."""
        pair = pair_shapes(weight, self.rank)
        return {**pair, FROZEN_DOWN: pair[DOWN], FROZEN_UP: pair[UP]}

    @classmethod
    def form_for(cls, site: Site, rank: int, sizes: RankSizes, settings: RankSettings) -> PissaForm:
        out, *inputs = site.module.weight.shape
        if rank > (most := min(out, torch.Size(inputs).numel())):
            raise UserError(
                f"{site.name}: a rank of {rank} is above the {most} singular values of the layer, from which "
                "networks.pissa starts; give it a lower one (network_dim, conv_dim, network_reg_dims)"
            )
        return PissaForm()

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> PissaForm:
        return PissaForm(from_base=False)

    def initialise(self) -> None:
        """Zeros, until `_start` or a file gives them values."""
        for holder in (self.lora_down, self.lora_up, self.pissa_down, self.pissa_up):
            torch.nn.init.zeros_(holder.weight)

    @torch.no_grad()
    def _start(self) -> None:
        generator = generator_for(self, "start")
        seed = None if generator is None else generator.initial_seed()
        left, values, right = principal(weight_of(self.site.module).float().flatten(1), self.rank, seed)
        root = (values / self.scale).sqrt()
        for down, up in ((self.lora_down, self.lora_up), (self.pissa_down, self.pissa_up)):
            down.weight.copy_((root[:, None] * right.T).view_as(down.weight))
            up.weight.copy_((left * root).view_as(up.weight))

    # -- what it adds

    def factors(self) -> tuple[Tensor, Tensor]:
        return _product(self.lora_down.weight, self.lora_up.weight, self.pissa_down.weight, self.pissa_up.weight)

    @classmethod
    def matrices(cls, tensors: Mapping[str, Tensor], weight: Shape) -> tuple[Tensor, Tensor]:
        return _product(*(tensors[name].float().flatten(1) for name in cls.NAMES))

    def is_zero(self) -> bool:
        return torch.equal(self.lora_down.weight, self.pissa_down.weight) and torch.equal(
            self.lora_up.weight, self.pissa_up.weight
        )

    def refuses(self, capability: Capability) -> str | None:
        if capability == "scale_weight_norms":
            return (
                "--scale_weight_norms: networks.pissa trains the layer's own directions, whose difference has no scale"
            )
        return super().refuses(capability)


def _product(down: Tensor, up: Tensor, frozen_down: Tensor, frozen_up: Tensor) -> tuple[Tensor, Tensor]:
    """[A - A0; A0] and [B, B - B0]."""
    return torch.cat([down - frozen_down, frozen_down]), torch.cat([up, up - frozen_up], dim=1)


def principal(matrix: Tensor, rank: int, seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix, their left vectors [out, r] and their right ones [in, r].

    Large matrices: 8 power steps on 2r + 8 random directions (Halko, Martinsson, Tropp 2011), drawn with the seed, or
    from torch's stream for None. Their r directions hold at least 99 % of the squared norm that the best r hold, also
    where singular values lie so near to each other that it does not matter which of them are taken.
    """
    if min(matrix.shape) <= max(_SMALL, 2 * rank + 8):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank].T
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(matrix, q=2 * rank + 8, niter=_POWER_STEPS)
    return left[:, :rank], values[:rank], right[:, :rank]
