"""VeRA: two vectors a layer between random matrices that all layers share (Kopiczko et al. 2023, arXiv 2310.11454).

`--network_module networks.vera`. The change of a layer is diag(b) B diag(d) A with frozen A and B, the same for all
layers but for their sizes: each takes the first rows and columns that it needs. On convolutions they act on
[out, in * height * width]. Few numbers are trained, so `--network_dim` is larger than LoRA's (256 in the paper) and
learning rates are about ten times as high. Files are plain LoRA, as large as one of that rank.

A and B are drawn from a seed, as peft draws them, and no state or file holds them: `vera_projection` has the seed and
their sizes.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.optimizers.custom_adamw.pairs import Role
from networks.adapter import Adapter, Shape
from networks.formats.own_form import OwnForm
from networks.magnitude import Form
from networks.settings import Asked, RankSettings, RankSizes, RateSettings
from networks.settings import LayerSizes as AnySizes
from networks.settings import OwnFormSettings as Settings
from networks.sites import Site

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.models.blocks import Blocks

logger = logging.getLogger(__name__)

LAMBDA_D, LAMBDA_B, PROJECTION = "vera_lambda_d", "vera_lambda_b", "vera_projection"

_MOST_NUMBERS = 2**30  # of A or B, 4 GB


@dataclass(frozen=True, kw_only=True)
class Sizes(RankSizes):
    """As peft names them. d_initial: the first value of d. projection_prng_key: the seed of A and B."""

    d_initial: float = 0.1
    projection_prng_key: int = 0


class Projection(NamedTuple):
    """What A, [rank, inputs], and B, [outputs, rank], follow from."""

    seed: int
    rank: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class VeraForm(Form):
    """projection: a file's; None: it follows from the seed and from the layers of the network."""

    seed: int = 0
    d_initial: float = 0.1
    projection: Projection | None = None


class VeRA(OwnForm):
    """d = `vera_lambda_d` starts at d_initial, b = `vera_lambda_b` at 0, so that a new adapter changes nothing."""

    NAME = "vera"
    NOUN = "VeRA in its own form"
    NAMES = (LAMBDA_D, LAMBDA_B, PROJECTION)
    READS: ClassVar[tuple[str, ...]] = ("vera",)
    RAISED = LAMBDA_B
    ROLES = MappingProxyType[str, Role]({})
    SETTINGS = Settings
    SIZES = Sizes

    form: VeraForm
    projection: Projection
    vera_lambda_d: nn.Parameter
    vera_lambda_b: nn.Parameter
    vera_projection: Tensor

    @classmethod
    def usual_form(cls) -> VeraForm:
        return VeraForm()

    def __init__(self, site: Site, **settings: Any) -> None:
        super().__init__(site, **settings)
        buffer = torch.zeros(len(Projection._fields), dtype=torch.int64, device=self.vera_lambda_d.device)
        self.register_buffer(PROJECTION, buffer)
        self.register_load_state_dict_post_hook(_read_projection)
        self.joined([self])  # until a network joins it with others

    @classmethod
    def joined(cls, adapters: Sequence[Adapter]) -> None:
        """New layers get matrices that are large enough for all of them."""
        own = [adapter for adapter in adapters if isinstance(adapter, VeRA)]
        new = [adapter for adapter in own if adapter.form.projection is None]
        shapes = [_matrix_shape(adapter.site.module.weight.shape) for adapter in new]
        for adapter in own:
            adapter.projection = adapter.form.projection or Projection(
                adapter.form.seed,
                max(other.rank for other in new),
                max(inputs for _, inputs in shapes),
                max(outputs for outputs, _ in shapes),
            )
            adapter.vera_projection.copy_(torch.tensor(adapter.projection))

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """d (r), b (out)."""
        return {LAMBDA_D: (self.rank,), LAMBDA_B: (weight[0],)}

    def initialise(self) -> None:
        nn.init.constant_(self.vera_lambda_d, self.form.d_initial)
        nn.init.zeros_(self.vera_lambda_b)

    # -- how large it is

    @classmethod
    def new(
        cls, site: Site, asked: Asked, sizes: AnySizes, settings: RateSettings, blocks: Blocks | None
    ) -> Self | None:
        assert isinstance(sizes, Sizes)
        given = {
            "network_alpha": None if asked.alpha == 1 else asked.alpha,
            "rs_lora": sizes.rs_lora or None,
            "conv_alpha": sizes.conv_alpha,
            "block_alphas": sizes.block_alphas,
            "conv_block_alphas": sizes.conv_block_alphas,
        }
        for name, value in given.items():
            if value is not None:
                raise UserError(f"{name}: {value} has no effect: networks.{cls.NAME} has no alpha")
        return super().new(site, asked, sizes, settings, blocks)

    @classmethod
    def sized(cls, rank: int, alpha: float, sizes: RankSizes) -> tuple[int, float]:
        """Its scale is 1."""
        return rank, float(rank)

    @classmethod
    def form_for(cls, site: Site, rank: int, sizes: RankSizes, settings: RankSettings) -> VeraForm:
        assert isinstance(sizes, Sizes)
        if not 0 <= sizes.projection_prng_key < 2**63:
            raise UserError(f"projection_prng_key: {sizes.projection_prng_key} is below 0, or takes more than 63 bits")
        return VeraForm(seed=sizes.projection_prng_key, d_initial=sizes.d_initial)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> VeraForm:
        found = _projection_of(tensors)
        outputs, inputs = _matrix_shape(site.module.weight.shape)
        numbers = found.rank * max(found.inputs, found.outputs)
        if found.rank < cls.rank_of(tensors) or found.inputs < inputs or found.outputs < outputs:
            raise UserError(f"{site.name}: {PROJECTION} {list(found)} is too small for this layer")
        if numbers > _MOST_NUMBERS:
            raise UserError(f"{site.name}: {PROJECTION} {list(found)} stands for matrices of {numbers} numbers")
        return VeraForm(projection=found)

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return len(tensors[LAMBDA_D])

    # -- what it adds

    def share(self, x: Tensor) -> Tensor:
        """b B (d A x): what is multiplied by the matrices is never scaled as a matrix."""
        project_down, project_up = self.project
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight = self.site.module.weight.shape
        down, up = _slices(self.projection, self.rank, weight, x.device, dtype)
        spatial = (1,) * (len(weight) - 2)
        hidden = project_down(x, down.reshape(self.rank, *weight[1:]))
        hidden = hidden * self.vera_lambda_d.view(-1, *spatial).to(hidden.dtype)
        if self.drops and self.training:
            hidden = self._drop(hidden)
        found = project_up(hidden * self.factor, up.reshape(weight[0], self.rank, *spatial))
        return found * self.vera_lambda_b.view(-1, *spatial).to(found.dtype)

    @classmethod
    def matrices(cls, tensors: Mapping[str, Tensor], weight: Shape) -> tuple[Tensor, Tensor]:
        d, b = tensors[LAMBDA_D].float(), tensors[LAMBDA_B].float()
        projection = Projection(0, len(d), *reversed(_matrix_shape(weight))) if d.is_meta else _projection_of(tensors)
        down, up = _slices(projection, len(d), weight, d.device, torch.float32)
        return down * d[:, None], up * b[:, None]

    def is_zero(self) -> bool:
        return not (self.vera_lambda_b.any() and self.vera_lambda_d.any())

    def shrink(self, ratio: float) -> None:
        self.vera_lambda_b.mul_(ratio)


def _matrix_shape(weight: Shape) -> tuple[int, int]:
    """(out, in * height * width)."""
    return weight[0], math.prod(weight[1:])


def _projection_of(tensors: Mapping[str, Tensor]) -> Projection:
    numbers = tensors[PROJECTION].flatten().tolist()
    if len(numbers) != len(Projection._fields) or not all(number >= 0 for number in numbers):
        raise UserError(f"{PROJECTION}: {numbers} is not a seed and three sizes")
    return Projection(*map(int, numbers))


def _read_projection(module: VeRA, _: object) -> None:
    """A file's seed is part of what it does."""
    if not module.vera_projection.is_meta:
        before, module.projection = module.projection.seed, _projection_of({PROJECTION: module.vera_projection})
        if module.projection.seed != before:
            _say_seed(module.projection.seed, before)


@functools.lru_cache(maxsize=4)  # it is asked for each layer
def _say_seed(found: int, given: int) -> None:
    logger.warning("projection_prng_key: that of the file, %d, is used, and not %d", found, given)


def _slices(
    projection: Projection, rank: int, weight: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A layer's part of A, [r, in * height * width], and of B, [out, r]."""
    outputs, inputs = _matrix_shape(weight)
    a, b = shared(projection, device, dtype)
    return a[:rank, :inputs], b[:outputs, :rank]


@functools.lru_cache(maxsize=4)
def shared(projection: Projection, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B, uniform within √(6 / columns) (He et al. 2015): drawn once, and the same on every device."""
    shapes = (projection.rank, projection.inputs), (projection.outputs, projection.rank)
    if device.type == "meta":
        return torch.empty(shapes[0], device=device, dtype=dtype), torch.empty(shapes[1], device=device, dtype=dtype)
    if device.type != "cpu" or dtype != torch.float32:
        a, b = shared(projection, torch.device("cpu"), torch.float32)
        return a.to(device, dtype), b.to(device, dtype)
    generator = torch.Generator().manual_seed(projection.seed)
    bounds = [math.sqrt(6 / columns) for _, columns in shapes]
    a, b = (
        torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for shape, bound in zip(shapes, bounds, strict=True)
    )
    return a, b
