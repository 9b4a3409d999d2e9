"""LoRA: a low-rank pair beside each layer, `W x + multiplier * alpha / r * up(down(x))` (Hu et al. 2021).

`--network_module networks.lora`. On convolutions, `down` has the layer's kernel and stride and `up` is 1x1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from library.errors import UserError
from library.rng import torch_generator
from networks import blocks, rates
from networks.network import AdapterModule, AdapterNetwork, Site, find_sites, in_names_of
from networks.weights import by_module, read_weights

if TYPE_CHECKING:
    from library.models.family import AdapterTargets


class LoRA(AdapterModule):
    """The pair on one layer. `up` starts at 0, so that a new adapter changes nothing."""

    plus_suffix = "lora_up.weight"

    def __init__(
        self,
        site: Site,
        *,
        rank: int,
        alpha: float | None,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        seed: int | None = None,
    ) -> None:
        """`seed`: draw the initial weights by (seed, name), whatever other layers there are; None: torch's stream."""
        super().__init__(site, rank=rank, alpha=alpha)
        layer = site.module
        device = "meta" if layer.weight.is_meta else "cpu"  # an outline, which is not trained, costs nothing
        self.project_down: Callable[[Tensor, Tensor], Tensor] = F.linear
        self.project_up: Callable[[Tensor, Tensor], Tensor] = F.linear
        self.rank_axis = -1
        # skip_init: the layers' own initialisation would draw numbers only to be overwritten
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1 or layer.padding_mode != "zeros":
                raise UserError(
                    f"{site.name}: grouped or wrapped-around convolutions are not supported by networks.lora"
                )
            shape = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            self.lora_down = skip_init(
                nn.Conv2d, layer.in_channels, rank, layer.kernel_size, bias=False, device=device, **shape
            )
            self.lora_up = skip_init(nn.Conv2d, rank, layer.out_channels, 1, bias=False, device=device)
            self.project_down = functools.partial(F.conv2d, **shape)
            self.project_up = F.conv2d
            self.rank_axis = 1
        else:
            self.lora_down = skip_init(nn.Linear, layer.in_features, rank, bias=False, device=device)
            self.lora_up = skip_init(nn.Linear, rank, layer.out_features, bias=False, device=device)
        if device != "meta":
            generator = None if seed is None else torch_generator(seed, site.name, "lora_down")
            nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.lora_up.weight)
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.drops = bool(dropout or rank_dropout or module_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives for `x`, and the adapter's share.

        The weights take the dtype of `x`, not the other way round: they are small and `x` is not. Where autocast is on
        it has the last word; where it is off, a base in bf16 runs with adapters in fp32.
        """
        if self.factor == 0 or (self.drops and self.training and self._left_out()):
            return self.base_forward(x)
        hidden = self.project_down(x, self.lora_down.weight.to(x.dtype))
        if self.drops and self.training:
            hidden = self._drop(hidden)
        # scaled while it has r channels, added in place: the output has hundreds or thousands of them
        share = self.project_up(hidden * self.factor, self.lora_up.weight.to(x.dtype))
        return share.add_(self.base_forward(x))

    def _left_out(self) -> bool:
        """Module dropout: the whole adapter, for this forward."""
        return bool(self.module_dropout) and torch.rand(()).item() < self.module_dropout

    def _drop(self, hidden: Tensor) -> Tensor:
        """Dropout of single values, and of whole ranks per sample; both make up for what is missing."""
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout:
            shape = [1] * hidden.ndim
            shape[0], shape[self.rank_axis] = hidden.shape[0], self.rank
            kept = torch.rand(shape, device=hidden.device) > self.rank_dropout
            hidden = hidden * kept / (1 - self.rank_dropout)
        return hidden

    def _pair(self) -> tuple[Tensor, Tensor]:
        """down as [r, in * k * k] and up as [out, r], fp32."""
        return self.lora_down.weight.float().flatten(1), self.lora_up.weight.float().flatten(1)

    def delta_weight(self) -> Tensor:
        down, up = self._pair()
        return (up @ down * self.scale).view(self.site.module.weight.shape)

    def weight_norm(self) -> Tensor:
        """Without forming the product: |UD|² = tr((UᵀU)(DDᵀ)), two r x r matrices."""
        down, up = self._pair()
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt() * abs(self.scale)

    @classmethod
    def weight_norms(cls, adapters: Sequence[AdapterModule]) -> list[Tensor]:
        """On a GPU pairs of the same shapes in one batch: a UNet has hundreds of them and a dozen different shapes."""
        if all(parameter.device.type == "cpu" for adapter in adapters for parameter in adapter.parameters()):
            return super().weight_norms(adapters)  # stacking would cost more than hundreds of small products
        return cls._batched_norms(adapters)

    @staticmethod
    def _batched_norms(adapters: Sequence[AdapterModule]) -> list[Tensor]:
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

    def scale_weights(self, ratio: float) -> None:
        self.lora_down.weight.mul_(ratio**0.5)
        self.lora_up.weight.mul_(ratio**0.5)


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: object,
    text_encoder: object,
    unet: object,
    neuron_dropout: float | None = None,
    *,
    targets: Sequence[AdapterTargets],
    seed: int | None = None,
    conv_dim: int | None = None,
    conv_alpha: float | None = None,
    rank_dropout: float | None = None,
    module_dropout: float | None = None,
    loraplus_lr_ratio: float | None = None,
    loraplus_unet_lr_ratio: float | None = None,
    loraplus_text_encoder_lr_ratio: float | None = None,
    down_lr_weight: str | None = None,
    mid_lr_weight: str | None = None,
    up_lr_weight: str | None = None,
    block_lr_zero_threshold: float = 0.0,
    network_reg_lrs: str | None = None,
    block_dims: str | None = None,
    block_alphas: str | None = None,
    conv_block_dims: str | None = None,
    conv_block_alphas: str | None = None,
) -> AdapterNetwork:
    """A network of new adapters; the models are known from `targets`.

    Linear and 1x1 convolutions take `network_dim` (None: 4) and `network_alpha` (None: 1; 0: the rank). With `conv_dim`
    the ResNet blocks and resamplers are adapted too, wider kernels with `conv_dim` and `conv_alpha` (None: 1; 0: the
    rank). Dropout rates lie in [0, 1). A LoRA+ ratio multiplies the learning rate of `up` (Hayou et al. 2024).
    `down_lr_weight` and so on: rates by block of the UNet, without the blocks whose weight is 0; `network_reg_lrs`:
    rates by pattern (networks/rates.py). `block_dims` and so on: ranks and alphas by block of the UNet, 0 for none
    (networks/blocks.py); where those of convolutions are given, ResNet blocks and resamplers are adapted too.
    """
    sites = find_sites(targets, conv=True)
    numbering = blocks.blocks_of(sites)
    ranks = blocks.ranks(
        _rank("network_dim", 4 if network_dim is None else network_dim),
        1.0 if network_alpha is None else network_alpha,
        dims=block_dims,
        alphas=block_alphas,
        blocks=numbering,
        names=("block_dims", "block_alphas"),
    )
    if conv_alpha is not None and conv_alpha < 0:
        raise UserError(f"conv_alpha: {conv_alpha:g} is below 0")
    conv_ranks = blocks.ranks(
        0 if conv_dim is None else _rank("conv_dim", conv_dim),
        1.0 if conv_alpha is None else conv_alpha,
        dims=conv_block_dims,
        alphas=conv_block_alphas,
        blocks=numbering,
        names=("conv_block_dims", "conv_block_alphas"),
    )
    if not conv_ranks.any:
        sites = find_sites(targets, conv=False)
    weights = rates.block_weights(
        down_lr_weight, mid_lr_weight, up_lr_weight, block_lr_zero_threshold, blocks=numbering
    )
    dropout = _dropouts(neuron_dropout, rank_dropout, module_dropout)
    adapters = []
    for site in rates.without_zero_blocks(sites, weights):
        rank, alpha = (conv_ranks if site.spatial else ranks).of(site)
        if rank:
            adapters.append(LoRA(site, rank=rank, alpha=alpha, seed=seed, **dropout))
    ratios = _plus_ratios(loraplus_lr_ratio, loraplus_unet_lr_ratio, loraplus_text_encoder_lr_ratio)
    return AdapterNetwork(
        adapters,
        multiplier=multiplier,
        plus_ratios=ratios,
        block_weights=weights,
        pattern_rates=rates.pattern_rates(network_reg_lrs),
    )


def create_network_from_weights(
    multiplier: float,
    file: str | None,
    vae: object,
    text_encoder: object,
    unet: object,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    *,
    targets: Sequence[AdapterTargets],
    seed: int | None = None,
    neuron_dropout: float | None = None,
    rank_dropout: float | None = None,
    module_dropout: float | None = None,
    loraplus_lr_ratio: float | None = None,
    loraplus_unet_lr_ratio: float | None = None,
    loraplus_text_encoder_lr_ratio: float | None = None,
    down_lr_weight: str | None = None,
    mid_lr_weight: str | None = None,
    up_lr_weight: str | None = None,
    block_lr_zero_threshold: float = 0.0,
    network_reg_lrs: str | None = None,
) -> tuple[AdapterNetwork, Mapping[str, Tensor]]:
    """A network with the layers, ranks and alphas of a file, and the file's tensors, which are not loaded yet.

    Settings of rates are those of `create_network`; blocks with weight 0 stay in the network, untrained.
    """
    if weights_sd is None:
        assert file is not None, "neither a file nor weights"
        weights_sd = read_weights(file, purpose="is trained by networks.lora")
    sites = find_sites(targets, conv=True)
    weights_sd = in_names_of(sites, weights_sd)
    modules = {name: tensors for name, tensors in by_module(weights_sd).items() if "lora_down.weight" in tensors}
    if not modules:
        raise UserError(f"{file}: holds no low-rank pair; the first tensor is {next(iter(weights_sd), '')!r}")
    dropout = _dropouts(neuron_dropout, rank_dropout, module_dropout)
    adapters = []
    for site in sites:
        if site.name in modules:
            rank = modules[site.name]["lora_down.weight"].shape[0]
            alpha = float(modules[site.name].get("alpha", torch.tensor(rank)))  # old files have none
            adapters.append(LoRA(site, rank=rank, alpha=alpha, seed=seed, **dropout))
    if not adapters:
        raise UserError(f"{file}: none of its {len(modules)} modules, such as {next(iter(modules))}, is in this model")
    ratios = _plus_ratios(loraplus_lr_ratio, loraplus_unet_lr_ratio, loraplus_text_encoder_lr_ratio)
    network = AdapterNetwork(
        adapters,
        multiplier=multiplier,
        plus_ratios=ratios,
        block_weights=rates.block_weights(
            down_lr_weight, mid_lr_weight, up_lr_weight, block_lr_zero_threshold, blocks=blocks.blocks_of(sites)
        ),
        pattern_rates=rates.pattern_rates(network_reg_lrs),
    )
    return network, weights_sd


def _rank(name: str, rank: int) -> int:
    if rank < 1:
        raise UserError(f"{name}: {rank} is not a rank, it must be 1 or more")
    return int(rank)


def _dropouts(dropout: float | None, rank_dropout: float | None, module_dropout: float | None) -> dict[str, float]:
    given = {"dropout": dropout or 0.0, "rank_dropout": rank_dropout or 0.0, "module_dropout": module_dropout or 0.0}
    for name, rate in given.items():
        if not 0 <= rate < 1:
            raise UserError(f"{'network_' * (name == 'dropout')}{name}: {rate} is not in [0, 1)")
    return given


def _plus_ratios(both: float | None, unet: float | None, text_encoder: float | None) -> dict[str, float | None]:
    """A part's own ratio, or the one for both; 0 counts as not given, as kohya has it."""
    return {"unet": unet or both or None, "text_encoder": text_encoder or both or None}
