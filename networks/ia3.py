"""(IA)³: scales outputs or inputs of layers, one factor for each (Liu et al. 2022, arXiv 2205.05638).

`--network_module networks.ia3`. `W * (1 + m * w)` with w for each row, or for each input channel: LyCORIS' form, w = 0
at the start; the paper's l is 1 + w. As in the paper, keys and values are scaled behind their layers, and in the
feed-forward what goes into its second layer. Biases are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.adapter import Capability, OnWeight, Shape
from networks.settings import Asked, LayerSizes, RateSettings
from networks.settings import RateSettings as Settings
from networks.sites import Site, find_sites

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.models.blocks import Blocks
    from library.models.family import AdapterTargets

WEIGHT, ON_INPUT = "weight", "on_input"

# By the ends of their paths, in diffusers' and in transformers' modules
_KEYS_AND_VALUES = re.compile(r"(?:.*\.)?(?:to_[kv]|[kv]_proj)")
_SECOND = re.compile(r"(?:.*\.)?(?:ff\.net\.2|mlp\.fc2)")


@dataclass(frozen=True, kw_only=True)
class Sizes(LayerSizes):
    """train_on_input: scale the inputs of all layers, or with False the outputs of all; unless given, the paper's
    choice: inputs of the feed-forward's second layers, outputs elsewhere. enable_all_linear, enable_conv: not keys,
    values and feed-forward alone."""

    train_on_input: bool | None = None
    enable_all_linear: bool = False
    enable_conv: bool = False


@dataclass(frozen=True)
class Form:
    """on_input: whether it has a factor for each input channel, or for each output."""

    on_input: bool = False


class IA3(OnWeight):
    """The factors of one layer, less 1."""

    NAME = "ia3"
    NOUN = "(IA)³"
    NAMES = (WEIGHT, ON_INPUT)
    SETTINGS = Settings
    SIZES = Sizes

    form: Form
    on_input: Tensor
    weight: nn.Parameter

    def __init__(self, site: Site, *, form: object, rank: int = 0, seed: int | None = None) -> None:
        super().__init__(site, rank=rank, form=form, seed=seed)
        self.register_buffer(ON_INPUT, torch.tensor(int(self.form.on_input)))

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """weight (channels), of a convolution (1, channels, 1, 1)."""
        channels = weight[1] if self.form.on_input else weight[0]
        return {WEIGHT: (channels,) if len(weight) == 2 else (1, channels, *(1 for _ in weight[2:]))}

    def initialise(self) -> None:
        nn.init.zeros_(self.weight)

    # -- where it sits

    @classmethod
    def sites(cls, targets: Sequence[AdapterTargets], asked: Asked, sizes: LayerSizes) -> list[Site]:
        assert isinstance(sizes, Sizes)
        usual = find_sites(targets, conv=False)
        left = {
            site.name
            for site in usual
            if not (sizes.enable_all_linear or _KEYS_AND_VALUES.fullmatch(site.path) or _SECOND.fullmatch(site.path))
        }
        found = [site for site in find_sites(targets, conv=sizes.enable_conv) if site.name not in left]
        if not found:
            raise UserError("networks.ia3: this model has no keys, values and feed-forward layers under known names")
        return found

    @classmethod
    def new(
        cls, site: Site, asked: Asked, sizes: LayerSizes, settings: RateSettings, blocks: Blocks | None
    ) -> Self | None:
        assert isinstance(sizes, Sizes)
        cls.refuse_without(asked, "dim", "alpha", "dropout")
        on_input = bool(_SECOND.fullmatch(site.path)) if sizes.train_on_input is None else sizes.train_on_input
        return cls(site, form=Form(on_input), seed=asked.seed)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> Form:
        return Form(bool(tensors[ON_INPUT].flatten()[0]))

    def completed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Some programs write on_input as a list of one."""
        flag = tensors.get(ON_INPUT, self.on_input)
        return {**tensors, ON_INPUT: flag.reshape(()) if flag.numel() == 1 else flag}

    # -- on the layer

    def forward(self, x: Tensor) -> Tensor:
        if self.is_off():
            return self.base_forward(x)
        layer, change = self.site.module, self.weight * self.multiplier
        if isinstance(layer, nn.Conv2d):
            change = change.view(-1, 1, 1)
        if self.form.on_input:
            return self.base_forward(torch.addcmul(x, x, change.to(x.dtype)))
        base = self.base_forward(x)
        change = change.to(base.dtype)
        if layer.bias is None:
            return torch.addcmul(base, base, change)
        return torch.addcmul(base, base - layer.bias.to(base.dtype).view(change.shape), change)

    # -- its weights

    @classmethod
    def effective_weight(cls, weight: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        base, factors = weight.float(), tensors[WEIGHT].to(weight.device, torch.float32).flatten()
        axis = 1 if tensors[ON_INPUT].any() else 0
        shape = [-1 if place == axis else 1 for place in range(weight.ndim)]
        return base + base * (factors * multiplier).view(shape)

    def refuses(self, capability: Capability) -> str | None:
        if capability == "scale_weight_norms":
            return "--scale_weight_norms: networks.ia3 scales the layers' weights: how far depends on their own norms"
        return super().refuses(capability)
