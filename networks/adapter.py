"""One adapter on one layer: what all kinds share, and what those with a rank share.

A kind is one file beside this one, with a subclass of `Adapter`, and one line in `networks.kinds.KINDS`. It says which
tensors it has and what they add to a layer's weight; everything else has a default here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from library.quantization.frozen import is_own, weight_of
from library.rng import torch_generator, uniform
from networks.layers import Preset, of_preset
from networks.ranks import check_reg_dims, ranks_of, reg_dim
from networks.settings import Asked, LayerSizes, RankSettings, RankSizes, RateSettings
from networks.sites import Site, blocks_of, find_sites

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.models.blocks import Blocks
    from library.models.family import AdapterTargets
    from library.optimizers.custom_adamw.pairs import Role

logger = logging.getLogger(__name__)

Shape = Sequence[int]
Capability = Literal["off", "scale_weight_norms", "sharded_gradients"]

_UNSET = {"dim": None, "alpha": 1.0, "dropout": 0.0}  # the options' defaults


@lru_cache(maxsize=32)  # it is asked for each layer
def _warn_once(said: str) -> None:
    logger.warning("--%s", said)


class Holder(nn.Module):
    """Puts a parameter one level down: what files call "lora_down.weight" is `adapter.lora_down.weight`."""

    weight: nn.Parameter


class Adapter(nn.Module):
    """An adapter that adds `multiplier * delta()` to the weight of its layer.

    A kind has `NAME`, `NOUN`, `NAMES`, `shapes`, `initialise`, `delta_of` and `shrink`. It may have a faster
    `share` or `norm`. One that is not additive (`OnWeight`) has an `effective_weight` and a `forward` of its own.

    The adapter takes the place of the layer's `forward` and calls the layer's own as `base_forward`. The layer itself
    is held outside of the module tree, so that `state_dict` and `parameters` see the adapter alone.
    """

    NAME: ClassVar[str]  # in KINDS
    NOUN: ClassVar[str]  # in messages, behind "only": "plain LoRA"
    NAMES: ClassVar[tuple[str, ...]]  # the names that its tensors can have in files
    READS: ClassVar[tuple[str, ...]] = ()  # the kinds of files' layers that it reads (`adapter_file`); (): its own name
    FROZEN: ClassVar[tuple[str, ...]] = ()  # those of its tensors that are never trained: buffers, no parameters
    RAISED: ClassVar[str | None] = None  # LoRA+: the tensor that gets the raised rate (see `raises`)
    ROLES: ClassVar[Mapping[str, Role]] = MappingProxyType({})  # for optimizers: the halves of a product, by tensor
    SETTINGS: ClassVar[type[RateSettings]] = RateSettings  # `Settings` of its file: the schema of --network_args
    SIZES: ClassVar[type[LayerSizes]] = LayerSizes  # `Sizes` of its file
    LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d)  # that it can sit on
    BY_LENGTH: ClassVar[bool] = False  # whether its training depends on the run's length (`total` of `after_step`)

    scale: float = 1.0  # of `delta`, for optimizers

    def __init__(self, site: Site, *, rank: int = 0, form: object = None, seed: int | None = None) -> None:
        """`form`: what else decides its shapes, for the kinds that have such. `seed`: draw the initial weights by
        (seed, name), whatever other layers there are; None: torch's stream."""
        super().__init__()
        self.rank, self.form = rank, self.usual_form() if form is None else form
        layer = site.module
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
            raise UserError(
                f"{site.name}: grouped or wrapped-around convolutions are not supported by networks.{self.NAME}"
            )
        self.site, self.seed = site, seed
        self.multiplier = 1.0
        self.module_dropout = 0.0  # see `RateSettings`
        self._on_top_of(layer.forward)
        outline = layer.weight.is_meta  # not trained: its adapter costs nothing
        for name, shape in self.shapes(layer.weight.shape).items():
            self._declare(name, torch.empty(tuple(shape), device="meta" if outline else "cpu"))
        if not outline:
            self.initialise()
        self.declare_more()

    def _declare(self, name: str, tensor: Tensor) -> None:
        """A parameter, or one of the FROZEN buffers, under its name in files: "w" or "w.weight"."""
        first, dot, rest = name.partition(".")
        if dot and first not in self._modules:
            self.add_module(first, Holder())
        owner = self.get_submodule(first) if dot else self
        if name in self.FROZEN:
            owner.register_buffer(rest or first, tensor)
        else:
            owner.register_parameter(rest or first, nn.Parameter(tensor))

    # -- what a kind says

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """The shape of each tensor, by its name in files, on a layer whose weight has the shape `weight`: of a Linear
        (out, in), of a convolution (out, in, height, width). It follows from `rank` and `form`."""
        raise NotImplementedError

    @classmethod
    def usual_form(cls) -> object:
        """The `form` where none is given."""
        return None

    def declare_more(self) -> None:
        """What the layer has beside the tensors of `shapes`, with its first values."""

    @classmethod
    def reads(cls) -> tuple[str, ...]:
        """The kinds of files' layers that it reads, as `library.models.checkpoints.adapter_file` names them."""
        return cls.READS or (cls.NAME,)

    @classmethod
    def lacking(cls, names: Collection[str]) -> str | None:
        """The tensor that a layer with some of this kind's tensors needs as well; None if it is complete."""
        return next((name for name in cls.NAMES if name not in names), None)

    def initialise(self) -> None:
        """Give the tensors their first values, with which the adapter adds nothing."""
        raise NotImplementedError

    @classmethod
    def delta_of(cls, tensors: Mapping[str, Tensor], weight: Shape) -> Tensor:
        """The difference that a layer's tensors, as files have them, make to a weight of this shape; fp32."""
        raise NotImplementedError

    def shrink(self, ratio: float) -> None:
        """Multiply `delta` by `ratio`, in place."""
        raise NotImplementedError

    # -- where it sits, and how large it is

    @classmethod
    def sites(cls, targets: Sequence[AdapterTargets], asked: Asked, sizes: LayerSizes) -> list[Site]:
        """The layers that a new network can adapt, before the user's choice among them."""
        return find_sites(targets, conv=False)

    @classmethod
    def sites_in(cls, targets: Sequence[AdapterTargets], preset: Preset) -> list[Site]:
        """The layers of a preset that a new network can adapt."""
        return of_preset(targets, preset)

    @classmethod
    def new(
        cls, site: Site, asked: Asked, sizes: LayerSizes, settings: RateSettings, blocks: Blocks | None
    ) -> Self | None:
        """A new adapter on a layer; None where it would have the size 0. `UserError` for options without effect."""
        return cls.as_in_file(site, {}, asked, settings)

    @classmethod
    def as_in_file(cls, site: Site, tensors: Mapping[str, Tensor], asked: Asked, settings: RateSettings) -> Self:
        """An adapter of the size that a layer has in a file; the tensors are not loaded yet."""
        cls.refuse_without(asked, "dim", "alpha", "dropout")
        return cls(site, form=cls.form_in(site, tensors), seed=asked.seed)

    @classmethod
    def refuse_without(cls, asked: Asked, *names: str) -> None:
        """`UserError` for options of these names, which this kind has no use for, unless they have their defaults."""
        given = asdict(asked)
        for name in names:
            value = given[name]
            if value is not None and value != _UNSET[name]:
                lacks = "rank" if name == "dim" else name
                said = f"network_{name}: {value:g} has no effect: networks.{cls.NAME} has no {lacks}"
                if not asked.is_lenient:
                    raise UserError(said)
                if logger.isEnabledFor(logging.WARNING):  # not in a rehearsal, which would use the one warning up
                    _warn_once(said)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> object:
        """The `form` that a layer's tensors have in a file."""
        return None

    # -- on the layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for `x`, and the adapter's share."""
        return self.base_forward(x) if self.is_off() else self.share(x).add_(self.base_forward(x))

    def is_off(self) -> bool:
        """Whether it adds nothing in this forward: at the multiplier 0, and where module dropout leaves it out."""
        if self.multiplier == 0:
            return True
        return self.module_dropout > 0 and self.training and uniform() < self.module_dropout

    def share(self, x: Tensor) -> Tensor:
        """The adapter's part of the layer's output, times the multiplier; a tensor of its own.

        The delta takes the dtype of `x`, not the other way round: it is small and `x` is not. Where autocast is on it
        has the last word; where it is off, a base in bf16 runs with adapters in fp32.
        """
        return product(self.site.module, x, (self.delta_in_forward() * self.multiplier).to(x.dtype), None)

    def delta_in_forward(self) -> Tensor:
        """`delta`, or in training what is left of it."""
        return self.delta()

    def _on_top_of(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.base_forward = forward
        # whether that is the layer's own, with its weight and bias as they are, and not another adapter's
        self.alone = is_own(self.site.module, forward)

    def attach(self) -> None:
        """Run on every forward of the layer from now on."""
        self._on_top_of(self.site.module.forward)
        vars(self.site.module)["forward"] = self.forward

    def detach(self) -> None:
        """Give the layer its own forward back."""
        layer = self.site.module
        assert vars(layer).get("forward") == self.forward, f"{self.site.name}: not attached, or something sits on top"
        del vars(layer)["forward"]  # the class's forward shows again …
        if layer.forward != self.base_forward:
            vars(layer)["forward"] = self.base_forward  # … unless another adapter was there before

    def set_multiplier(self, multiplier: float) -> None:
        """1 as trained, 0 exactly the base."""
        self.multiplier = multiplier

    # -- its weights

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by their names in files."""
        return dict(self.state_dict(keep_vars=True))

    def export(self) -> dict[str, Tensor]:
        """The tensors that a file gets. A kind whose files others read as another kind's returns that kind's."""
        return dict(self.state_dict())

    def completed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that a file has for this layer, with those that old files leave out."""
        return dict(tensors)

    def delta(self) -> Tensor:
        """The difference to the layer's weight at multiplier 1, in fp32 and the weight's shape."""
        return self.delta_of(self.tensors(), self.site.module.weight.shape)

    @classmethod
    def needs_weight(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the difference that a layer's tensors make depends on its weight: `delta_of` cannot tell it then."""
        return False

    @classmethod
    def effective_weight(cls, weight: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        """The weight with which the layer alone gives what it gives with the adapter; fp32, where `weight` lies."""
        return weight.float() + cls.delta_of(tensors, weight.shape).to(weight.device) * multiplier

    @classmethod
    def effective_bias(cls, bias: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        """The bias that goes with `effective_weight`: the layer's own, for kinds that leave it alone."""
        return bias

    def merged(self, leaf: str, tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """The layer's "weight" or "bias" with an adapter of these tensors in it, in its own dtype, where it lies."""
        effective = self.effective_weight if leaf == "weight" else self.effective_bias
        return effective(weight, tensors, self.multiplier).to(weight.dtype)

    def norm(self) -> Tensor:
        """Frobenius norm of `delta`, a 0-d fp32 tensor."""
        return self.delta().norm()

    @classmethod
    def norms(cls, adapters: Sequence[Adapter]) -> list[Tensor]:
        """`norm` of each of these, all of this class; where that pays, a subclass takes many at once."""
        return [adapter.norm() for adapter in adapters]

    # -- for optimizers

    def pairs(self) -> list[tuple[str, str]]:
        """The (down, up) tensors of ROLES whose plain product up @ down counts in the delta."""
        names = {role: name for name, role in self.ROLES.items()}
        return [(names["down"], names["up"])] if names.keys() >= {"down", "up"} else []

    def raises(self, name: str) -> bool:
        """Whether LoRA+ raises the rate of one of its tensors."""
        return name == self.RAISED

    # -- in training, for kinds that do more than their forward

    def refuses(self, capability: Capability) -> str | None:
        """As `TrainableNetwork.refuses`."""
        return None

    @classmethod
    def joined(cls, adapters: Sequence[Adapter]) -> None:
        """Once, when a network of these adapters, all of this class, is made: for what they share."""

    def before_training(self) -> None:
        """Once, when its tensors have the precision in which they are trained."""

    def before_batch(self) -> None:
        """Before each batch that is trained on."""

    @classmethod
    def at_noise(cls, adapters: Sequence[Adapter], share_B: Tensor) -> None:
        """As `TrainableNetwork.at_noise`, for these adapters, all of this class."""

    @classmethod
    def penalty(cls, adapters: Sequence[Adapter]) -> Tensor | None:
        """A term of the training loss that these adapters, all of this class, add; 0-d, fp32."""
        return None

    @classmethod
    def after_step(cls, adapters: Sequence[Adapter], done: int, total: int) -> None:
        """After optimizer step `done` of `total`, with the gradients still there."""

    # -- files without weight

    def stays_zero(self) -> bool:
        """Whether it is not trained and adds nothing to its layer: it never will. Not known on the meta device."""
        if any(parameter.requires_grad or parameter.is_meta for parameter in self.parameters()):
            return False
        return self.is_zero()

    def is_zero(self) -> bool:
        """Whether `delta` is zero everywhere."""
        return not bool(self.delta().any())


class OnWeight(Adapter):
    """An adapter whose difference depends on the layer's weight. A kind has an `effective_weight` and a `forward`."""

    @classmethod
    def needs_weight(cls, tensors: Mapping[str, Tensor]) -> bool:
        return True

    def delta(self) -> Tensor:
        weight = weight_of(self.site.module).detach().float()
        return self.effective_weight(weight, self.tensors(), 1.0) - weight


class WithRank(Adapter):
    """An adapter with a rank r, whose delta is scaled by alpha / r, and with dropout.

    A kind gives `product_of` instead of `delta_of`.
    `factor`, by which the adapter's output is multiplied, is multiplier * scale.
    """

    SETTINGS = RankSettings
    SIZES = RankSizes
    HIGHEST_RANK: ClassVar[int | None] = 16384  # None: any
    IMAGE_RANK_AXIS: ClassVar[int] = 1  # of what lies between the factors on a convolution
    alpha: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int,
        alpha: float | None,
        form: object = None,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        seed: int | None = None,
    ) -> None:
        """`alpha` None or 0 means `rank`. Dropout rates in [0, 1): of single values, whole ranks, the whole adapter."""
        rank, alpha = self.settled(site, rank, alpha, form)
        super().__init__(site, rank=rank, form=form, seed=seed)
        self.register_buffer("alpha", torch.tensor(float(alpha or rank)))
        self.factor = self.scale = self.scale_for(float(alpha or rank), rank)
        self.rank_axis = self.IMAGE_RANK_AXIS if isinstance(site.module, nn.Conv2d) else -1
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.drops = bool(dropout or rank_dropout)
        self.register_load_state_dict_post_hook(_read_scale)

    @classmethod
    def settled(cls, site: Site, rank: int, alpha: float | None, form: object) -> tuple[int, float | None]:
        """The rank and alpha that an adapter of this form really has."""
        return rank, alpha

    @staticmethod
    def scale_for(alpha: float, rank: int) -> float:
        """alpha / rank; an alpha of 0 means the rank."""
        return (alpha or rank) / rank

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        """The rank of a layer's tensors, as files have them."""
        raise NotImplementedError

    @classmethod
    def product_of(cls, tensors: Mapping[str, Tensor], weight: Shape) -> Tensor:
        """The delta before it is scaled."""
        raise NotImplementedError

    @classmethod
    def delta_of(cls, tensors: Mapping[str, Tensor], weight: Shape) -> Tensor:
        """`product_of`, scaled; tensors without an alpha, as old files have them, have the rank as alpha."""
        rank = cls.rank_of(tensors)
        alpha = float(tensors["alpha"]) if "alpha" in tensors else float(rank)
        return cls.product_of(tensors, weight) * cls.scale_for(alpha, rank)

    def delta(self) -> Tensor:
        return self.product_of(self.tensors(), self.site.module.weight.shape) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base_forward(x) if self.is_off() else self.with_share(x)

    def with_share(self, x: Tensor) -> Tensor:
        """The layer's output for `x`, and the adapter's share, which is added in place."""
        return self.share(x).add_(self.base_forward(x))

    def set_multiplier(self, multiplier: float) -> None:
        super().set_multiplier(multiplier)
        self.factor = multiplier * self.scale

    @classmethod
    def sites(cls, targets: Sequence[AdapterTargets], asked: Asked, sizes: LayerSizes) -> list[Site]:
        """With the ResNet blocks and resamplers where convolutions get a rank, or where a pattern gives them one."""
        assert isinstance(sizes, RankSizes)
        every = find_sites(targets, conv=True)
        check_reg_dims(sizes.network_reg_dims, every)
        if ranks_of(asked, sizes, blocks_of(targets))[1].any:
            return every
        usual = {site.name for site in find_sites(targets, conv=False)}
        return [site for site in every if site.name in usual or reg_dim(site, sizes.network_reg_dims)]

    @classmethod
    def new(
        cls, site: Site, asked: Asked, sizes: LayerSizes, settings: RateSettings, blocks: Blocks | None
    ) -> Self | None:
        assert isinstance(sizes, RankSizes)
        assert isinstance(settings, RankSettings)
        usual, spatial = ranks_of(asked, sizes, blocks)
        rank, alpha = (spatial if site.spatial else usual).of(site)
        rank = reg_dim(site, sizes.network_reg_dims) or rank
        if not rank:
            return None
        if cls.HIGHEST_RANK is not None and rank > cls.HIGHEST_RANK:
            raise UserError(f"network_dim: {rank}: networks.{cls.NAME} takes {cls.HIGHEST_RANK} at most")
        form = cls.form_for(site, rank, sizes, settings)
        rank, alpha = cls.sized(rank, alpha or rank, sizes)
        return cls._made(site, rank, alpha, form, asked, settings)

    @classmethod
    def as_in_file(cls, site: Site, tensors: Mapping[str, Tensor], asked: Asked, settings: RateSettings) -> Self:
        """Old files have no alpha: it is the rank."""
        assert isinstance(settings, RankSettings)
        rank = cls.rank_of(tensors)
        alpha = float(tensors.get("alpha", torch.tensor(rank)))
        return cls._made(site, rank, alpha, cls.form_in(site, tensors), asked, settings)

    @classmethod
    def _made(cls, site: Site, rank: int, alpha: float, form: object, asked: Asked, settings: RankSettings) -> Self:
        dropouts = settings.with_values(asked.dropout)
        made = cls(site, rank=rank, alpha=alpha, form=form, seed=asked.seed, **dropouts)
        made.take(settings)
        return made

    @classmethod
    def sized(cls, rank: int, alpha: float, sizes: RankSizes) -> tuple[int, float]:
        """The rank and the alpha of a new adapter, from those that are asked for; neither is 0.

        rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) scales by alpha / sqrt(r): programs divide a file's alpha by r.
        """
        return rank, alpha * rank**0.5 if sizes.rs_lora else alpha

    def before_training(self) -> None:
        """Train with the scale that a state or a file will have: `alpha` is rounded to its type."""
        if not self.alpha.is_meta:
            _read_scale(self, None)

    def take(self, settings: RankSettings) -> None:
        """Keep what of the settings is needed after the adapter is made; checked. Raises UserError."""

    @classmethod
    def form_for(cls, site: Site, rank: int, sizes: RankSizes, settings: RankSettings) -> object:
        """The `form` of a new adapter. `UserError` for settings that do not fit the layer."""
        return None

    def completed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Old files have no alpha: it is the rank; some programs write it as a list of one."""
        alpha = tensors.get("alpha", torch.tensor(float(self.rank)))
        return {**tensors, "alpha": alpha.reshape(()) if alpha.numel() == 1 else alpha}

    def _drop(self, hidden: Tensor) -> Tensor:
        """Dropout of single values, and of whole ranks per sample; both make up for what is missing.

        hidden: what `down` gives, with its ranks along `rank_axis`.
        """
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout:
            shape = [1] * hidden.ndim
            shape[0], shape[self.rank_axis] = hidden.shape[0], hidden.shape[self.rank_axis]
            kept = torch.rand(shape, device=hidden.device) > self.rank_dropout
            hidden = hidden * kept / (1 - self.rank_dropout)
        return hidden


def _read_scale(module: WithRank, _: object) -> None:
    """A file's alpha is part of what it does: weights loaded with it act as they did when they were saved."""
    module.scale = module.scale_for(module.alpha.item(), module.rank)
    module.set_multiplier(module.multiplier)


def product(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The operation of a Linear or a Conv2d with another weight and bias."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
    return F.linear(x, weight, bias)


def generator_for(adapter: Adapter, tensor: str) -> torch.Generator | None:
    """The random numbers of a tensor's first values; None: torch's stream."""
    return None if adapter.seed is None else torch_generator(adapter.seed, adapter.site.name, tensor)
