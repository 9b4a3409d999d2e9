"""OFT: rotates the outputs of a layer in blocks (Qiu et al. 2023, arXiv 2306.07280).

`--network_module networks.oft`. Block k of the weight's rows becomes `R_k^T W_k`, with R = (I + Q)(I - Q)^-1 (Cayley)
and Q = B - B^T, which is skew, so that R is orthogonal. B starts at 0. With the multiplier m: `W + m * (R^T W - W)`.
The tensors are those of LyCORIS' diag-oft and of kohya's networks.oft.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.adapter import Capability, OnWeight, Shape
from networks.lokr import factorization
from networks.settings import Asked, LayerSizes, RateSettings
from networks.settings import RateSettings as Settings
from networks.sites import Site, find_sites

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.models.blocks import Blocks
    from library.models.family import AdapterTargets

logger = logging.getLogger(__name__)

BLOCKS, RESCALE, ALPHA = "oft_blocks", "rescale", "alpha"

_USUAL_DIM = 4  # kohya's and LyCORIS'
_ATTENTION = re.compile(r"(?:.*\.)?(?:to_[qkv]|to_out\.0|[qkv]_proj|out_proj)")  # layers, by the ends of their paths
_HANDY = 32  # in bf16 three times as fast as blocks of 8, in fp32 as fast
_TINY = 1e-8  # LyCORIS' and kohya's, beside norms


@dataclass(frozen=True, kw_only=True)
class RotationSizes(LayerSizes):
    """constraint: the Frobenius norm of all Q of a layer is at most constraint * its outputs; 0: no bound.
    rescaled: train a factor for each output as well, behind the rotation."""

    constraint: float | None = None
    rescaled: bool = False


@dataclass(frozen=True, kw_only=True)
class Sizes(RotationSizes):
    """As kohya has it, `--network_dim` is the number of blocks, 4 unless given, and `--network_alpha` below 1 is the
    constraint. dim_is_size: it is the size of a block, as LyCORIS has it, and there is no alpha. conv_dim: instead of
    `--network_dim` on k x k convolutions. enable_all_linear, enable_conv, enable_text_encoder: not the attention of the
    UNet alone.
    """

    dim_is_size: bool = False
    conv_dim: int | None = None
    enable_all_linear: bool = False
    enable_conv: bool = False
    enable_text_encoder: bool = False


@dataclass(frozen=True)
class Form:
    """`count` blocks of size x size, in each of `stages` (OFT: one)."""

    count: int
    size: int
    rescaled: bool = False
    stages: int = 1


class OFT(OnWeight):
    """The blocks of one layer. They are applied to the layer's output without its bias, so that no product with the
    weight is formed again."""

    NAME = "oft"
    NOUN = "OFT"
    NAMES = (BLOCKS, RESCALE)
    SETTINGS = Settings
    SIZES: ClassVar[type[RotationSizes]] = Sizes

    form: Form
    alpha: Tensor
    oft_blocks: nn.Parameter
    rescale: nn.Parameter

    def __init__(
        self, site: Site, *, form: object, rank: int = 0, constraint: float = 0.0, seed: int | None = None
    ) -> None:
        super().__init__(site, rank=rank, form=form, seed=seed)
        self.register_buffer(ALPHA, torch.tensor(float(constraint)))
        self.constraint = float(constraint)
        self.register_load_state_dict_post_hook(_read_constraint)

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """oft_blocks (blocks, size, size), rescale (out, 1, …)."""
        form = self.form
        shapes: dict[str, Shape] = {BLOCKS: (form.count, form.size, form.size)}
        return shapes | ({RESCALE: (weight[0], *(1 for _ in weight[1:]))} if form.rescaled else {})

    @classmethod
    def lacking(cls, names: Collection[str]) -> str | None:
        return None if BLOCKS in names else BLOCKS

    def initialise(self) -> None:
        nn.init.zeros_(self.oft_blocks)
        if self.form.rescaled:
            nn.init.ones_(self.rescale)

    # -- where it sits, and how large it is

    @classmethod
    def sites(cls, targets: Sequence[AdapterTargets], asked: Asked, sizes: LayerSizes) -> list[Site]:
        """kohya's choice: the attention of the UNet, unless more is asked for."""
        assert isinstance(sizes, Sizes)
        if not sizes.enable_text_encoder:
            others = [target for target in targets if target.part != "text_encoder"]
            if len(others) < len(targets):
                logger.info("networks.oft: the text encoders are left out (enable_text_encoder=True adapts them)")
            targets = others
        left = {
            site.name
            for site in find_sites(targets, conv=False)
            if not (sizes.enable_all_linear or _ATTENTION.fullmatch(site.path))
        }
        return [site for site in find_sites(targets, conv=sizes.enable_conv) if site.name not in left]

    @classmethod
    def new(
        cls, site: Site, asked: Asked, sizes: LayerSizes, settings: RateSettings, blocks: Blocks | None
    ) -> Self | None:
        assert isinstance(sizes, Sizes)
        cls.refuse_without(asked, "dropout")
        bound = sizes.constraint
        if sizes.dim_is_size:
            cls.refuse_without(asked, "alpha")
            bound = bound or 0.0
        elif bound is None:  # 1 and above bounds nothing that training reaches, and is the option's default
            bound = asked.alpha if asked.alpha is not None and asked.alpha < 1 else 0.0
        if sizes.conv_dim == 0 and site.spatial and sizes.preset is not None:
            return None
        count, size = _cut(site, asked, sizes)
        if size == 1:  # as LyCORIS' rule has it of conv_out's 4 outputs at dim 4
            logger.warning("%s: stays as it is: blocks of 1 x 1 rotate nothing", site.name)
            return None
        form = Form(count, size, sizes.rescaled)
        return cls(site, form=form, constraint=checked_constraint(bound), seed=asked.seed)

    @classmethod
    def as_in_file(cls, site: Site, tensors: Mapping[str, Tensor], asked: Asked, settings: RateSettings) -> Self:
        cls.refuse_without(asked, "dropout")
        constraint = float(tensors.get(ALPHA, torch.tensor(0.0)))
        return cls(site, form=cls.form_in(site, tensors), constraint=constraint, seed=asked.seed)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> Form:
        *stages, count, size, _ = tensors[BLOCKS].shape
        if count * size != (out := site.module.weight.shape[0]):
            raise UserError(f"{site.name}: {count} blocks of {size} x {size} in the file, for {out} outputs")
        return Form(count, size, RESCALE in tensors, *stages)

    # -- on the layer

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_forward(x)
        if self.is_off():
            return base
        change = _joined(_change(self.tensors(), self.constraint) * self.multiplier)
        count, size, bias = *change.shape[:2], self.site.module.bias
        # the change of the bias, which is not rotated; [blocks, 1, size]. Not as a product, since autocast rounds those
        of_bias = None if bias is None else (bias.to(change).view(count, size, 1) * change).sum(1, keepdim=True)
        change = change.to(base.dtype)
        if isinstance(self.site.module, nn.Conv2d):
            cut = base.reshape(len(base), count, size, -1)
            moved = change.mT @ cut
            if of_bias is not None:
                moved = moved.sub_(of_bias.mT)
            return (cut + moved).reshape(base.shape)
        cut = base.reshape(-1, count, size)
        rows = cut.transpose(0, 1)
        moved = rows @ change if of_bias is None else torch.baddbmm(-of_bias.to(base.dtype), rows, change)
        return (cut + moved.transpose(0, 1)).reshape(base.shape)

    # -- its weights

    def before_training(self) -> None:
        """Train with the bound that a state or a file will have: it is rounded to its type."""
        if not self.alpha.is_meta:
            _read_constraint(self, None)

    def completed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without an alpha there is no bound."""
        alpha = tensors.get(ALPHA, torch.tensor(0.0))
        return {**tensors, ALPHA: alpha.reshape(()) if alpha.numel() == 1 else alpha}

    @classmethod
    def effective_weight(cls, weight: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        change = _change(tensors, float(tensors.get(ALPHA, 0.0))).to(weight.device)
        cut = weight.float().reshape(*change.shape[:2], -1)
        return torch.baddbmm(cut, change.mT, cut, alpha=multiplier).view(weight.shape)

    def refuses(self, capability: Capability) -> str | None:
        if capability == "scale_weight_norms":
            return (
                f"--scale_weight_norms: networks.{self.NAME} rotates the weight and keeps its norm; "
                "constraint=… bounds how far"
            )
        return super().refuses(capability)


def turn_of(blocks: Tensor, constraint: float) -> Tensor:
    """R - I of each block, [(stages,) blocks, size, size] in fp32: R - I = 2 Q (I - Q)^-1, without a rounded 1."""
    blocks = blocks.float()
    skew = blocks - blocks.mT
    if constraint > 0:
        bound = constraint * blocks.shape[-3] * blocks.shape[-2]  # times the outputs
        skew = skew * (bound / (skew.norm() + _TINY)).clamp(max=1)
    unit = torch.eye(blocks.shape[-1], device=blocks.device)
    turned, _ = torch.linalg.solve_ex(unit - skew, 2 * skew)  # I - Q of a skew Q is never singular: nothing to check
    return turned


def _change(tensors: Mapping[str, Tensor], constraint: float) -> Tensor:
    """R diag(g) - I of each block, [blocks, size, size] in fp32, with g = rescale."""
    change = turn_of(tensors[BLOCKS], constraint)
    if (rescale := tensors.get(RESCALE)) is None:
        return change
    factors = rescale.float().view(len(change), 1, -1)
    return change * factors + torch.diag_embed(factors[:, 0] - 1)


def _joined(change: Tensor) -> Tensor:
    """Neighbouring blocks as one block with zeros, [blocks, size, size], while it is not larger than _HANDY: products
    with many tiny matrices take longer than with fewer of this size."""
    count, size, _ = change.shape
    together = max((number for number in range(1, _HANDY // size + 1) if count % number == 0), default=1)
    if together == 1:
        return change
    groups = change.view(-1, together, size, size).permute(0, 2, 3, 1)
    wide = together * size
    return torch.diag_embed(groups, dim1=1, dim2=3).reshape(-1, wide, wide)


def _read_constraint(module: OFT, _: object) -> None:
    module.constraint = module.alpha.item()


def checked_constraint(value: float) -> float:
    """`UserError` unless it is a bound or 0."""
    if not 0 <= value < float("inf"):
        raise UserError(f"constraint: {value:g} is no bound: 0 for none, or a small positive number such as 1e-3")
    return value


def _cut(site: Site, asked: Asked, sizes: Sizes) -> tuple[int, int]:
    """How many blocks a layer gets, and of which size. Raises UserError."""
    out = site.module.weight.shape[0]
    option, given = "network_dim", asked.dim
    if site.spatial and sizes.conv_dim is not None:
        option, given = "conv_dim", sizes.conv_dim
    if given is None:
        given = _USUAL_DIM
    if given < 1:
        raise UserError(f"{option}: {given} is not positive")
    if sizes.dim_is_size:
        size, count = factorization(out, given)
    else:
        size, count = out // given, given
        if out % given:
            fitting = [number for number in range(1, out // 2 + 1) if out % number == 0]
            near = sorted(sorted(fitting, key=lambda number: abs(number - given))[:3])
            raise UserError(
                f"{site.name}: {option} {given}: its {out} outputs do not divide into so many blocks; into "
                f"{' or '.join(map(str, near))} they do"
            )
    if size < 2 and (given < 2 or not sizes.dim_is_size):
        raise UserError(f"{site.name}: {option} {given} makes blocks of 1 x 1, which rotate nothing")
    return count, size
