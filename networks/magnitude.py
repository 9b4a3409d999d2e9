"""Weight decomposition, which DoRA adds to an adapter with a rank (Liu et al. 2024, arXiv 2402.09353).

`W' = W + m * ((W + delta) * g / |W + delta| - W)`: the direction comes from the adapter, the length g of each row or
column is trained by itself and starts as |W|. As in the paper's section 4.3 the norm is a constant for the gradient.
With the multiplier m that is how ComfyUI and A1111 weigh such a file; at m = 1, as trained, all programs agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from library.quantization.frozen import weight_of
from networks.adapter import Capability, Shape, WithRank
from networks.settings import DecomposeSizes, RankSettings, RankSizes, TuckerSizes
from networks.sites import Site

DORA_SCALE = "dora_scale"
Axis = Literal["output", "input"]

_AXES: Mapping[Axis, int] = {"output": 0, "input": 1}
_SMALLEST = torch.finfo(torch.float32).eps  # a norm below it counts as this: rows of zeros stay zeros


@dataclass(frozen=True)
class Form:
    """axis: which norms are trained, of the rows ("output") or of the input channels; None: the adapter has none.
    tucker: whether wide kernels are cut into a Tucker core and two 1 x 1 parts."""

    axis: Axis | None = None
    tucker: bool = False


def axis_for(sizes: RankSizes) -> Axis | None:
    """By `dora_wd` and `wd_on_output`."""
    if not isinstance(sizes, DecomposeSizes) or not sizes.dora_wd:
        return None
    return "output" if sizes.wd_on_output else "input"


def axis_in(site: Site, tensors: Mapping[str, Tensor]) -> Axis | None:
    """That of a file's layer: `dora_scale` is [out, 1, …], [1, in, …] or, in some files, [out]."""
    if (scale := tensors.get(DORA_SCALE)) is None:
        return None
    return "output" if scale.ndim == 1 or len(scale) == len(site.module.weight) else "input"


class WithMagnitude(WithRank):
    """An adapter with a rank that can be decomposed."""

    form: Form
    dora_scale: nn.Parameter

    _weight_norm: Tensor | None = None  # squared
    _norm: tuple[tuple[int, ...], Tensor] | None = None  # with the versions of the tensors that it is of

    @classmethod
    def usual_form(cls) -> Form:
        return Form()

    def declare_more(self) -> None:
        if self.form.axis is None:
            return
        weight = self.site.module.weight
        shape = _shape(weight.shape, self.form.axis)
        self._declare(DORA_SCALE, torch.empty(shape, device="meta" if weight.is_meta else "cpu"))
        if not weight.is_meta:
            with torch.no_grad():
                self.dora_scale.copy_(norms_of(weight_of(self.site.module), self.form.axis))

    @classmethod
    def form_for(cls, site: Site, rank: int, sizes: RankSizes, settings: RankSettings) -> Form:
        return Form(axis_for(sizes), tucker=site.spatial and isinstance(sizes, TuckerSizes) and sizes.use_tucker)

    @classmethod
    def form_in(cls, site: Site, tensors: Mapping[str, Tensor]) -> Form:
        return Form(axis_in(site, tensors))

    def with_share(self, x: Tensor) -> Tensor:
        if self.form.axis is None:
            return super().with_share(x)
        more = self._ratio() - 1  # exactly 0 in a new adapter, so that it changes nothing
        bias = self.site.module.bias
        if self.form.axis == "input":
            return self._input_scaled(x, more)
        shape = (-1, *(1,) * (x.ndim - 2)) if isinstance(self.site.module, nn.Conv2d) else (-1,)
        base, share = self.base_forward(x), self.share(x)
        moved = base if bias is None else base - bias.view(shape)
        if self.multiplier != 1:
            moved = moved * self.multiplier
        # share + base + (share + moved) * more
        return torch.addcmul(share + base, share + moved, more.view(shape).to(base.dtype))

    def _input_scaled(self, x: Tensor, more: Tensor) -> Tensor:
        """The norms of input channels scale what goes in: W diag(c) x = W (c x), with c = 1 + more."""
        shape = (-1, *(1,) * (x.ndim - 2)) if isinstance(self.site.module, nn.Conv2d) else (-1,)
        change = more.view(shape).to(x.dtype)
        scaled = torch.addcmul(x, x, change)
        partly = scaled if self.multiplier == 1 else torch.addcmul(x, x, change * self.multiplier)
        return self.share(scaled).add_(self.base_forward(partly))

    # -- norms

    def _ratio(self) -> Tensor:
        """g / |W + delta|, without a gradient to the norm."""
        norm = self.norm_along().to(self.dora_scale.device)
        return self.dora_scale.float() / norm.view(self.dora_scale.shape)

    @torch.no_grad()
    def norm_along(self) -> Tensor:
        """|W + delta| of each row or input channel, fp32; formed once for each state of the tensors."""
        versions = tuple(tensor._version for tensor in self.tensors().values())
        if self._norm is None or self._norm[0] != versions:
            assert self.form.axis is not None
            if self._weight_norm is None:
                self._weight_norm = norms_of(weight_of(self.site.module), self.form.axis).flatten().square()
            squares = self._weight_norm.to(self.alpha.device) + self.squares_more(self.form.axis)
            self._norm = versions, squares.clamp(min=0).sqrt().clamp(min=_SMALLEST)
        return self._norm[1]

    def squares_more(self, axis: Axis) -> Tensor:
        """By how much delta changes the squared norms of W; subclasses avoid forming delta where they can."""
        weight, delta = weight_of(self.site.module), super().delta()
        summed = (delta * (2 * weight.to(delta.device, torch.float32) + delta)).movedim(_AXES[axis], 0)
        return summed.flatten(1).sum(1)

    def before_batch(self) -> None:
        """The weights may have been changed in a way that torch does not see."""
        self._norm = None

    # -- weights

    @classmethod
    def needs_weight(cls, tensors: Mapping[str, Tensor]) -> bool:
        return DORA_SCALE in tensors

    @classmethod
    def effective_weight(cls, weight: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        scale = tensors.get(DORA_SCALE)
        if scale is None:
            return super().effective_weight(weight, tensors, multiplier)
        base, direction = weight.float(), super().effective_weight(weight, tensors, 1.0)
        axis: Axis = "output" if len(scale) == len(weight) else "input"
        norm = norms_of(direction, axis).clamp(min=_SMALLEST)
        scaled = direction * (scale.to(weight.device, torch.float32).view(norm.shape) / norm)
        return base + (scaled - base) * multiplier

    def delta(self) -> Tensor:
        if self.form.axis is None:
            return super().delta()
        weight = weight_of(self.site.module).float()
        return self.effective_weight(weight, self.tensors(), 1.0) - weight

    def norm(self) -> Tensor:
        return self.delta().norm()

    def refuses(self, capability: Capability) -> str | None:
        if capability == "scale_weight_norms" and self.form.axis is not None:
            return (
                f"--scale_weight_norms: networks.{self.NAME} with dora_scale trains the norms of the layers themselves"
            )
        return super().refuses(capability)

    def completed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Some programs write the rows' norms as [out]."""
        found = super().completed(tensors)
        scale = found.get(DORA_SCALE)
        if scale is not None and scale.ndim == 1:
            found[DORA_SCALE] = scale.view(-1, *(1,) * (self.site.module.weight.ndim - 1))
        return found


def norms_of(weight: Tensor, axis: Axis) -> Tensor:
    """The norm of each row, [out, 1, …], or input channel, [1, in, …], in fp32."""
    other = [place for place in range(weight.ndim) if place != _AXES[axis]]
    return torch.linalg.vector_norm(weight.detach().float(), dim=other, keepdim=True)


def _shape(weight: Shape, axis: Axis) -> list[int]:
    return [size if place == _AXES[axis] else 1 for place, size in enumerate(weight)]


def low_rank_squares(weight: Tensor, down: Tensor, up: Tensor, scale: float, axis: Axis) -> Tensor:
    """By how much scale * up @ down changes the squared norms of `weight`, through products of r columns.

    down: [r, in, …] in the weight's form. up: [out, r]. |w + d|² = |w|² + 2 w·d + |d|², with |d|² from a Gram matrix.
    The product with the weight is formed in the weight's dtype (fp16 and bf16: 8 bits of it matter, since it is small
    beside |w|²).
    """
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.bfloat16
    flat, wide = weight.detach().flatten(1), down.flatten(1)
    if axis == "output":
        cross = (flat.to(dtype) @ wide.to(flat.device, dtype).T).to(up.device, torch.float32)
        return ((2 * scale) * cross + scale**2 * (up @ (wide @ wide.T))).mul_(up).sum(1)
    cross = (up.to(flat.device, dtype).T @ flat.to(dtype)).to(up.device, torch.float32)
    products = ((2 * scale) * cross + scale**2 * ((up.T @ up) @ wide)).mul_(wide)
    return products.view(len(wide), weight.shape[1], -1).sum((0, 2))
