"""LoKr: a Kronecker product beside each layer, `W + multiplier * s * kron(w1, w2)` (Yeh et al. 2023, arXiv 2309.14859).

`--network_module networks.lokr`. The layer's sizes are split, out = o_l * o_k and in = i_m * i_n; `w1` [o_l, i_m] is
small and `w2` [o_k, i_n] has the kernel of a convolution. Where the rank is below half of a factor's longer side, that
factor is a product of two matrices (`w1` only with `decompose_both`). s is alpha / rank, and 1 where both are whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from library.quantization.frozen import weight_of
from networks import magnitude
from networks.adapter import Adapter, Shape, generator_for
from networks.lora import projections
from networks.magnitude import DORA_SCALE, Axis, WithMagnitude, axis_in
from networks.settings import DecomposeSizes, RankSettings, RankSizes
from networks.settings import RankSettings as Settings
from networks.sites import Site

logger = logging.getLogger(__name__)

W1, W1_A, W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2_A, W2_B, T2 = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"


@dataclass(frozen=True, kw_only=True)
class Sizes(DecomposeSizes):
    """factor: the size that `w1` should have, at most; -1: as near to the square root as the layer's sizes allow.

    full_matrix: neither factor is a product of two. decompose_both: `w1` is one as well where the rank is low enough.
    unbalanced_factorization: `w1` has the larger part of the outputs.
    """

    factor: int = -1
    full_matrix: bool = False
    decompose_both: bool = False
    unbalanced_factorization: bool = False


@dataclass(frozen=True)
class Form(magnitude.Form):
    """outer: the shape of w1, (o_l, i_m). pair1, pair2: whether w1, w2 is a product of two matrices.
    factor: the one that was asked for, of a new adapter."""

    outer: tuple[int, int] = (1, 1)
    pair1: bool = False
    pair2: bool = False
    factor: int = -1


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is `size`, the smaller first: LyCORIS' rule.

    `factor` and its cofactor if it divides; else the two that are nearest to each other, with the smaller one at most
    `factor` (-1: whatever it is).
    """
    if factor > 0 and size % factor == 0:
        smaller = min(factor, size // factor)
    else:
        limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
        smaller = next(number for number in range(limit, 0, -1) if size % number == 0)
    return smaller, size // smaller


class LoKr(WithMagnitude):
    """The two factors on one layer. `w2`, or its part `w2_b`, starts at 0, so that a new adapter changes nothing.

    Dropout is that of kohya's LoRA, between the factors: `network_dropout` drops values of what `w2_b` (or a whole
    `w2`) returns, `rank_dropout` its channels per sample, and both make up for what is missing. (LyCORIS drops rows of
    delta, and does not make up for them.)
    """

    NAME = "lokr"
    NOUN = "LoKr"
    NAMES = (W1, W1_A, W1_B, W2, W2_A, W2_B, T2, DORA_SCALE)
    HIGHEST_RANK = None  # one above the sizes of a layer means whole matrices: LyCORIS' users give 100000
    IMAGE_RANK_AXIS = 2  # of what w2 returns
    RAISED = W1  # as kohya's networks.lokr, in the parts of w1 as well
    ROLES = MappingProxyType({W2_B: "down", W2_A: "up"})
    SETTINGS = Settings
    SIZES = Sizes

    form: Form
    lokr_w2: nn.Parameter
    lokr_w2_a: nn.Parameter
    lokr_w2_b: nn.Parameter
    lokr_t2: nn.Parameter

    @classmethod
    def settled(cls, site: Site, rank: int, alpha: float | None, form: object) -> tuple[int, float | None]:
        """Neither has an effect where both factors are whole: the rank is then the highest that w2 can have, and alpha
        the same, which every 16-bit format holds."""
        assert isinstance(form, Form)
        if form.pair1 or form.pair2:
            return rank, alpha
        return min(_inner(site.module.weight.shape, form.outer)[:2]), None

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """w1 (o_l, i_m), or w1_a (o_l, r) and w1_b (r, i_m). w2 (o_k, i_n, height, width), or w2_a (o_k, r) and w2_b
        (r, i_n * height * width), or with a Tucker core t2 (r, r, height, width): w2_a (r, o_k), w2_b (r, i_n)."""
        (o_l, i_m), r = self.form.outer, self.rank
        o_k, i_n, *kernel = _inner(weight, self.form.outer)
        shapes: dict[str, Shape] = {W1_A: (o_l, r), W1_B: (r, i_m)} if self.form.pair1 else {W1: (o_l, i_m)}
        if not self.form.pair2:
            return {**shapes, W2: (o_k, i_n, *kernel)}
        if self.form.tucker:
            return {**shapes, T2: (r, r, *kernel), W2_A: (r, o_k), W2_B: (r, i_n)}
        return {**shapes, W2_A: (o_k, r), W2_B: (r, i_n * math.prod(kernel))}

    @classmethod
    def lacking(cls, names: Collection[str]) -> str | None:
        for whole, *pair in ((W1, W1_A, W1_B), (W2, W2_A, W2_B)):
            missing = [name for name in pair if name not in names]
            if whole not in names and missing:
                return whole if len(missing) == len(pair) else missing[0]
        return None

    @classmethod
    def form_for(cls, site: Site, rank: int, sizes: RankSizes, settings: RankSettings) -> Form:
        """`UserError` for a factor that is none, and for decompose_both beside full_matrix."""
        assert isinstance(sizes, Sizes)
        if sizes.factor == 0 or sizes.factor < -1:
            raise UserError(f"factor: {sizes.factor} is out of range, it must be 1 or more, or -1 for the square root")
        if sizes.full_matrix and sizes.decompose_both:
            raise UserError("decompose_both: has no effect with full_matrix, which keeps both factors whole")
        out, inputs = site.module.weight.shape[:2]
        (o_l, o_k), (i_m, i_n) = factorization(out, sizes.factor), factorization(inputs, sizes.factor)
        if sizes.unbalanced_factorization:
            o_l, o_k = o_k, o_l
        pair1 = sizes.decompose_both and rank < max(o_l, i_m) / 2
        pair2 = not sizes.full_matrix and rank < max(o_k, i_n) / 2
        plain = super().form_for(site, rank, sizes, settings)
        return Form(plain.axis, plain.tucker and pair2, (o_l, i_m), pair1, pair2, sizes.factor)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> Form:
        """The shape of w1 is the file's; where the layer's sizes are no multiples of it another one, so that it does
        not fit and `Network.load` refuses it."""
        out, inputs = site.module.weight.shape[:2]
        o_l, i_m = matrix_in(tensors, W1).shape[:2]
        if out % o_l or inputs % i_m:
            o_l, i_m = factorization(out)[0], factorization(inputs)[0]
        return Form(axis_in(site, tensors), T2 in tensors, (o_l, i_m), W1 not in tensors, W2 not in tensors)

    @classmethod
    def joined(cls, adapters: Sequence[Adapter]) -> None:
        """Log where the factor that was asked for, the rank or alpha have no effect."""
        ours = [adapter for adapter in adapters if isinstance(adapter, LoKr)]
        other = [adapter for adapter in ours if adapter.form.factor > 0 and _takes_another_factor(adapter)]
        if other:
            (o_l, i_m), (o_k, i_n, *_) = other[0].form.outer, other[0].inner
            logger.warning(
                "factor: %d divides not both sizes of %d of %d layers, which take the nearest below it, such as %s: "
                "%d = %d x %d outputs, %d = %d x %d inputs",
                *(other[0].form.factor, len(other), len(ours), other[0].site.name),
                *(o_l * o_k, o_l, o_k, i_m * i_n, i_m, i_n),
            )
        if whole := sum(not (adapter.form.pair1 or adapter.form.pair2) for adapter in ours):
            logger.info("LoKr: both factors are whole in %d of %d layers: no rank, no alpha", whole, len(ours))

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of w2, (o_k, i_n, …)."""
        return _inner(self.site.module.weight.shape, self.form.outer)

    def initialise(self) -> None:
        """As LyCORIS': uniform within 1 / sqrt(columns), but for w2 or its part w2_b."""
        for name, tensor in self.named_parameters():
            if name in (W2, W2_B):
                nn.init.zeros_(tensor)
            elif name != DORA_SCALE:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator_for(self, name))

    # -- on the layer

    def share(self, x: Tensor) -> Tensor:
        """w2 on each of the i_m groups of channels, and w1 across the groups: where w2 is a pair between its halves, at
        r channels. Delta, which has out * in numbers, is never formed."""
        w1 = (matrix_in(dict(self.named_parameters()), W1) * self.factor).to(x.dtype)
        if isinstance(self.site.module, nn.Conv2d):
            return self._share_of_images(x, w1)
        hidden = F.linear(x.unflatten(-1, (w1.shape[1], -1)), self._first().to(x.dtype))
        if self.drops and self.training:
            hidden = self._drop(hidden)
        mixed = _mixed(w1, hidden.flatten(0, -3)).view(*hidden.shape[:-2], w1.shape[0], -1)
        return (F.linear(mixed, self._last().to(x.dtype)) if self.form.pair2 else mixed).flatten(-2)

    def _share_of_images(self, x: Tensor, w1: Tensor) -> Tensor:
        """The same on [B, in, height, width], each group of channels as an image of its own."""
        groups = x.reshape(len(x) * w1.shape[1], -1, *x.shape[2:])
        if self.form.tucker:
            groups = F.conv2d(groups, self.lokr_w2_b.to(x.dtype)[:, :, None, None])
        hidden = self._convolve(groups, self._first().to(x.dtype)).unflatten(0, (len(x), -1))
        if self.drops and self.training:
            hidden = self._drop(hidden)
        mixed = _mixed(w1, hidden.flatten(2)).view(-1, *hidden.shape[2:])
        if self.form.pair2:
            mixed = F.conv2d(mixed, self._last().to(x.dtype)[:, :, None, None])
        return mixed.view(len(x), -1, *mixed.shape[2:])

    @property
    def _convolve(self) -> Callable[[Tensor, Tensor], Tensor]:
        return projections(self.site.module)[0]

    def _first(self) -> Tensor:
        """The part of w2 that is applied first (of three Tucker parts the core), in the form of the layer's weight."""
        if not self.form.pair2:
            return self.lokr_w2
        if self.form.tucker:
            return self.lokr_t2
        return self.lokr_w2_b.view(self.rank, *self.inner[1:])

    def _last(self) -> Tensor:
        """The part of w2 that is applied last, [o_k, r]."""
        return self.lokr_w2_a.T if self.form.tucker else self.lokr_w2_a

    # -- weights

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        pair = next((tensors[name] for name in (W2_B, W1_B) if name in tensors), None)
        return min(tensors[W2].shape[:2]) if pair is None else len(pair)

    @classmethod
    def product_of(cls, tensors: Mapping[str, Tensor], weight: Shape) -> Tensor:
        w1 = matrix_in(tensors, W1)
        _, i_n, *kernel = _inner(weight, w1.shape)
        w2 = matrix_in(tensors, W2).view(-1, i_n, *kernel)
        return torch.kron(w1.view(*w1.shape, *(1 for _ in kernel)), w2)

    @classmethod
    def delta_of(cls, tensors: Mapping[str, Tensor], weight: Shape) -> Tensor:
        """Where both factors are whole, alpha has no effect: files have any there, infinity included."""
        if W1 in tensors and W2 in tensors:
            return cls.product_of(tensors, weight)
        return super().delta_of(tensors, weight)

    def completed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Some programs write w2_b with the layer's kernel."""
        found = super().completed(tensors)
        if not (self.form.pair1 or self.form.pair2):
            found["alpha"] = self.alpha.detach().clone()
        if not self.form.tucker and W2_B in found:
            found[W2_B] = found[W2_B].flatten(1)
        return found

    def squares_more(self, axis: Axis) -> Tensor:
        """With the weight as [o_l, o_k, i_m, i_n, kernel]: a product with w1, one with w2; |delta|² is that of both."""
        o_k, i_n, *kernel = self.inner
        tensors = self.tensors()
        w1, w2 = matrix_in(tensors, W1) * self.scale, matrix_in(tensors, W2).view(o_k, i_n, -1)
        weight = weight_of(self.site.module).detach().to(w1.device, torch.float32)
        weight = weight.view(len(w1), o_k, -1, i_n, math.prod(kernel))
        if axis == "output":
            cross = (torch.einsum("acbdk,ab->acdk", weight, w1) * w2).sum((2, 3))
            squares = torch.outer(w1.square().sum(1), w2.square().sum((1, 2)))
        else:
            cross = (torch.einsum("acbdk,ab->bcdk", weight, w1) * w2).sum((1, 3))
            squares = torch.outer(w1.square().sum(0), w2.square().sum((0, 2)))
        return (2 * cross + squares).flatten()

    def norm(self) -> Tensor:
        """|kron(w1, w2)| = |w1| |w2|."""
        if self.form.axis is not None:
            return super().norm()
        tensors = self.tensors()
        return matrix_in(tensors, W1).norm() * matrix_in(tensors, W2).norm() * abs(self.scale)

    def pairs(self) -> list[tuple[str, str]]:
        return [(W2_B, W2_A)] if self.form.pair2 and not self.form.tucker else []

    def raises(self, name: str) -> bool:
        return name.startswith(W1)

    def is_zero(self) -> bool:
        """Whether a tensor of the product is zero: w2 or w2_b is in a new adapter."""
        if self.form.axis is not None:
            return super().is_zero()
        return not all(parameter.any() for parameter in self.parameters())

    def shrink(self, ratio: float) -> None:
        trained = dict(self.named_parameters())
        for whole, part in ((W1, W1_B), (W2, W2_B)):
            trained[whole if whole in trained else part].mul_(ratio**0.5)


def _inner(weight: Shape, outer: Sequence[int]) -> tuple[int, ...]:
    """The shape of w2 on a layer whose weight has the shape `weight`."""
    return weight[0] // outer[0], weight[1] // outer[1], *weight[2:]


def matrix_in(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """w1 [o_l, i_m], or w2 [o_k, i_n * height * width], in fp32 and whole."""
    if name in tensors:
        return tensors[name].float().flatten(1)
    first, last = tensors[f"{name}_a"].float(), tensors[f"{name}_b"].float().flatten(1)
    if name == W2 and (core := tensors.get(T2)) is not None:
        return torch.einsum("pqhw,po,qi->oihw", core.float(), first, last).flatten(1)
    return first @ last


def _mixed(w1: Tensor, groups: Tensor) -> Tensor:
    """w1 across the groups of channels, [N, i_m, c] to [N, o_l, c]. `matmul` would transpose and copy all of them."""
    return torch.bmm(w1.expand(len(groups), -1, -1), groups)


def _takes_another_factor(adapter: LoKr) -> bool:
    return any(size % adapter.form.factor for size in adapter.site.module.weight.shape[:2])
