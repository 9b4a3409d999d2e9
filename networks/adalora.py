"""AdaLoRA: a budget of ranks that moves to the layers which need them (Zhang et al. 2023, arXiv 2303.10512).

`--network_module networks.adalora`. The change of a layer is P diag(E) Q, singular values E between factors that a
penalty keeps orthogonal. All layers begin with more ranks than `--network_dim`; during the run those whose loss would
be felt least are switched off, over all layers, until `--network_dim` a layer is left on average. Files are plain
LoRA, with a rank of its own in each layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.optimizers.custom_adamw.pairs import Role
from networks.adapter import Adapter, Capability, Shape, generator_for
from networks.formats.own_form import OwnForm
from networks.lora import DOWN, UP, pair_shapes
from networks.magnitude import Form
from networks.settings import OwnFormSettings, RankSettings, RankSizes
from networks.sites import Site

VALUES, TARGET, MASK = "lora_E", "lora_target", "lora_mask"
_TRAINED = (DOWN, VALUES, UP)
_AVERAGES = ("sensitivity", "uncertainty")  # of each trained tensor: states have "sensitivity.lora_E"


@dataclass(frozen=True, kw_only=True)
class Settings(OwnFormSettings):
    """As peft names them, but for tinit and tfinal, which are shares of the run here: all ranks are trained during the
    first share, and the ranks that are left are fixed during the last. deltaT: steps between two allocations.
    beta1, beta2: of the running averages of the sensitivity and of its uncertainty, in (0, 1)."""

    tinit: float = 0.1
    tfinal: float = 0.4
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Sizes(RankSizes):
    """init_r: the rank that layers with the rank `--network_dim` begin with; None: 1.5 times that. Other layers begin
    with their own rank in the same proportion."""

    init_r: int | None = None


@dataclass(frozen=True)
class AdaForm(Form):
    """target: the rank that is left for the layer on average."""

    target: int = 1


class Averages(nn.Module):
    """A buffer of zeros for each trained tensor."""

    def __init__(self, trained: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in trained.items():
            self.register_buffer(name.replace(".", "_"), torch.zeros_like(tensor, requires_grad=False))


class AdaLoRA(OwnForm):
    """P = `lora_up`, Q = `lora_down`, E from 0, so that a new adapter changes nothing. `alpha` belongs to the rank that
    it begins with: alpha / r is `--network_alpha` / `--network_dim` and stays so.

    States hold the running averages as well, and `lora_mask`: ones until the last allocation, the ranks that it left
    from there on. Until then, ranks that were switched off come back as they are trained.
    """

    NAME = "adalora"
    NOUN = "AdaLoRA in its own form"
    NAMES = (DOWN, VALUES, UP, TARGET)
    READS: ClassVar[tuple[str, ...]] = ("adalora",)
    FROZEN = (TARGET,)
    BY_LENGTH = True
    ROLES = MappingProxyType[str, Role]({})  # no product of two
    SETTINGS = Settings
    SIZES = Sizes

    form: AdaForm
    settings = Settings()
    ranks_are_fixed: bool | None = None  # of a network's first; None: not known
    lora_E: nn.Parameter
    lora_target: Tensor
    lora_mask: Tensor

    def __init__(self, site: Site, **settings: Any) -> None:
        super().__init__(site, **settings)
        self.register_buffer(MASK, torch.ones_like(self.lora_E))
        for name in _AVERAGES:
            self.add_module(name, Averages({part: self.get_parameter(part) for part in _TRAINED}))
        self.register_load_state_dict_post_hook(_forget_whether_fixed)

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """Q (r, in, …), E (r, 1), P (out, r, 1 …), and the layer's target rank."""
        return {**pair_shapes(weight, self.rank), VALUES: (self.rank, 1), TARGET: ()}

    def initialise(self) -> None:
        """P and Q N(0, 0.02), as peft's."""
        for name, holder in (("lora_down", self.lora_down), ("lora_up", self.lora_up)):
            nn.init.normal_(holder.weight, std=0.02, generator=generator_for(self, name))
        nn.init.zeros_(self.lora_E)
        self.lora_target.fill_(self.form.target)

    @classmethod
    def sized(cls, rank: int, alpha: float, sizes: RankSizes) -> tuple[int, float]:
        """The rank to begin with, and an alpha with which the scale is the one of a LoRA of the target rank."""
        assert isinstance(sizes, Sizes)
        first = math.ceil(1.5 * rank) if sizes.init_r is None else sizes.init_r
        if first < rank:
            raise UserError(f"init_r: {first} is below {rank}, the rank that is to be left")
        rank, alpha = super().sized(rank, alpha, sizes)
        return first, alpha * first / rank

    def take(self, settings: RankSettings) -> None:
        super().take(settings)
        assert isinstance(settings, Settings)
        _check(settings)
        self.settings = settings

    @classmethod
    def form_for(cls, site: Site, rank: int, sizes: RankSizes, settings: RankSettings) -> AdaForm:
        return AdaForm(target=rank)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> AdaForm:
        return AdaForm(target=round(float(tensors[TARGET])))

    # -- what it adds

    def factors(self) -> tuple[Tensor, Tensor]:
        down, values = self.lora_down.weight, self.lora_E * self.lora_mask
        return down * values.view(-1, *(1,) * (down.ndim - 1)), self.lora_up.weight

    @classmethod
    def matrices(cls, tensors: Mapping[str, Tensor], weight: Shape) -> tuple[Tensor, Tensor]:
        down, up = super().matrices(tensors, weight)
        return down * _values(tensors), up

    def export(self) -> dict[str, Tensor]:
        """Its own form without the values that are masked: an average of the weights (EMA) still has them."""
        found = super().export()
        return {**found, VALUES: _values(self.state_dict())} if VALUES in found else found

    def plain(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ranks whose value is not 0; nothing where none is left, and all in a new adapter.

        `alpha` is that of a LoRA of the target rank, whatever rank is left, and `up` makes up for it: diffusers (0.42)
        leaves out alphas of attention layers that differ from the others'.
        """
        mask, values = tensors[MASK], _values(tensors).flatten()
        if not mask.is_meta and (values.any() or not mask.all()):
            rows = values.nonzero().flatten()
            more = {VALUES: tensors[VALUES][rows], MASK: mask[rows]}
            tensors = {**tensors, DOWN: tensors[DOWN][rows], UP: tensors[UP][:, rows], **more}
        found, target = super().plain(tensors), self.form.target
        rank = len(found[DOWN])
        found |= {UP: found[UP] * (rank / target), "alpha": torch.tensor(self.scale * target)}
        return found if rank else {}

    def is_zero(self) -> bool:
        return not bool((self.lora_E * self.lora_mask).any())

    def shrink(self, ratio: float) -> None:
        self.lora_E.mul_(ratio)

    # -- in training

    def refuses(self, capability: Capability) -> str | None:
        if capability == "sharded_gradients":
            return "networks.adalora with DeepSpeed's ZeRO-2: a process has a part of the gradients, it needs all"
        return super().refuses(capability)

    @classmethod
    def penalty(cls, adapters: Sequence[Adapter]) -> Tensor | None:
        """orth_reg_weight times the mean of |Q Qᵀ - I| and |Pᵀ P - I| over all factors, as peft's."""
        own = _trained(adapters)
        if not own or not (weight := own[0].settings.orth_reg_weight):
            return None
        grams: dict[int, list[Tensor]] = {}  # by rank
        for adapter in own:
            down, up = adapter.lora_down.weight.float().flatten(1), adapter.lora_up.weight.float().flatten(1)
            grams.setdefault(adapter.rank, []).extend((down @ down.T, up.T @ up))
        norms = [
            torch.linalg.matrix_norm(torch.stack(some) - torch.eye(rank, device=some[0].device))
            for rank, some in grams.items()
        ]
        return weight * torch.cat(norms).mean()

    @classmethod
    def after_step(cls, adapters: Sequence[Adapter], done: int, total: int) -> None:
        """Measure how sensitive the loss is to each number; allocate the ranks that the schedule has for this step."""
        own = _trained(adapters)
        if not own:
            return
        first, settings = own[0], own[0].settings
        if first.ranks_are_fixed is None:  # a run that goes on; once, since the host waits for the device here
            first.ranks_are_fixed = not all(bool(adapter.lora_mask.all()) for adapter in own)
        if not first.ranks_are_fixed:
            _measure(own, settings)
            budget, fix = budget_at(done, total, _ranks_of(own), settings)
            if budget is not None:
                _allocate(own, budget, fix=fix)
            first.ranks_are_fixed = fix
        if first.ranks_are_fixed:
            torch._foreach_mul_([adapter.lora_E for adapter in own], [adapter.lora_mask for adapter in own])


def _forget_whether_fixed(module: AdaLoRA, _: object) -> None:
    """A state may be of before the last allocation, also where a run goes back after it diverged."""
    module.ranks_are_fixed = None


def _values(tensors: Mapping[str, Tensor]) -> Tensor:
    """E, (r, 1), fp32, without what is masked; files have no mask."""
    values = tensors[VALUES].float()
    return values * tensors[MASK] if MASK in tensors else values


def _trained(adapters: Sequence[Adapter]) -> list[AdaLoRA]:
    """Those that have not been frozen by a rate of 0."""
    return [one for one in adapters if isinstance(one, AdaLoRA) and all(p.requires_grad for p in one.parameters())]


# -- which ranks are left


def budget_at(done: int, total: int, ranks: tuple[int, int], settings: Settings) -> tuple[int | None, bool]:
    """The number of ranks that are left after step `done` of `total`, None: as many as there are; and whether they are
    the last ones. `ranks`: all, and those to be left.

    Cubic between the two shares of the run, equation 11 of the paper with n (1 - x)³.
    """
    every, target = ranks
    start, end = round(settings.tinit * total), total - round(settings.tfinal * total)
    if done >= end:
        return target, True
    if done <= start or done % settings.deltaT:
        return None, False
    left = 1 - (done - start) / (end - start)
    return int((every - target) * left**3 + target), False


def _ranks_of(adapters: Sequence[AdaLoRA]) -> tuple[int, int]:
    return sum(adapter.rank for adapter in adapters), sum(adapter.form.target for adapter in adapters)


def _measure(adapters: Sequence[AdaLoRA], settings: Settings) -> None:
    """Take a step's gradients into the running averages: the sensitivity |w * gradient| of the loss to a number, and
    how far it is from its average (equations 9 and 10)."""
    weights: list[Tensor] = [adapter.get_parameter(name) for adapter in adapters for name in _TRAINED]
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    averages, spreads = (
        [buffer for adapter in adapters for buffer in adapter.get_submodule(name).buffers()] for name in _AVERAGES
    )
    now = torch._foreach_abs(torch._foreach_mul(weights, gradients))
    torch._foreach_lerp_(averages, now, 1 - settings.beta1)
    torch._foreach_lerp_(spreads, torch._foreach_abs(torch._foreach_sub(now, averages)), 1 - settings.beta2)


def scores(adapter: AdaLoRA) -> Tensor:
    """How much each rank matters, [r]: sensitivity times uncertainty of its value, and the means of those of its row
    of Q and its column of P (equation 7)."""
    down, values, up = (
        (average * spread).float()
        for average, spread in zip(
            adapter.get_submodule("sensitivity").buffers(), adapter.get_submodule("uncertainty").buffers(), strict=True
        )
    )
    return values.flatten() + down.flatten(1).mean(1) + up.flatten(1).mean(0)


def _allocate(adapters: Sequence[AdaLoRA], budget: int, *, fix: bool) -> None:
    """Switch off all but the `budget` ranks with the highest scores over all layers; of equals the first."""
    every = torch.cat([scores(adapter) for adapter in adapters])
    kept = torch.zeros_like(every)
    kept[torch.sort(every, descending=True, stable=True).indices[:budget]] = 1
    for adapter, mask in zip(adapters, kept.split([adapter.rank for adapter in adapters]), strict=True):
        adapter.lora_E.mul_(mask[:, None])
        if fix:
            adapter.lora_mask.copy_(mask[:, None])


def _check(settings: Settings) -> None:
    for name, share in (("tinit", settings.tinit), ("tfinal", settings.tfinal)):
        if not 0 <= share < 1:
            raise UserError(f"{name}: {share:g} is not in [0, 1): it is a share of the run's steps")
    if settings.tinit + settings.tfinal >= 1:
        raise UserError(
            f"tinit: {settings.tinit:g} and tfinal: {settings.tfinal:g} leave no steps to allocate ranks in"
        )
    if settings.deltaT < 1:
        raise UserError(f"deltaT: {settings.deltaT} is below 1")
    for name, beta in (("beta1", settings.beta1), ("beta2", settings.beta2)):
        if not 0 < beta < 1:
            raise UserError(f"{name}: {beta:g} is not between 0 and 1")
    if settings.orth_reg_weight < 0:
        raise UserError(f"orth_reg_weight: {settings.orth_reg_weight:g} is below 0")
