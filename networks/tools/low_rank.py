"""The difference that a LoRA makes to a layer as two factors, and what can be computed from them alone.

No function but `dense` forms the difference itself, and only `largest` and `of_matrix` take one. With r ranks on a
layer of [out, in] the others cost O((out + in) r²), not O(out · in · min(out, in)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.errors import UserError
from networks.lora import DOWN, MID, UP, LoRA, pair_shapes

KINDS = ("lora",)  # of networks.kinds, whose files' layers are such factors
# Of the randomised decomposition. Of 1280 x 1280, singular values falling as 1 / sqrt(k), it keeps 99.999 % of what the
# exact one keeps at the ranks 16 and 64, in a tenth of the time; of white noise, the worst case, 97.9 and 99.7 %
_ITERATIONS = 8
_SMALL = 8  # it is taken where the shorter side is more than this many times the rank ...
_LARGE = 256  # ... and at least this long


@dataclass(frozen=True)
class Factors:
    """up @ down is the layer's difference at multiplier 1, scaled by alpha / r.

    up: [out, r], down: [r, in · k · k], both fp32. shape: of the layer's weight, (out, in) or (out, in, k, k).
    """

    up: Tensor
    down: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def spatial(self) -> bool:
        """Whether the layer is a convolution wider than 1 × 1."""
        return any(size != 1 for size in self.shape[2:])

    def times(self, weight: float) -> Factors:
        """The difference multiplied by `weight`."""
        return replace(self, up=self.up * weight)

    def dense(self) -> Tensor:
        """The difference as a matrix, [out, in · k · k]."""
        return self.up @ self.down

    def inner(self, other: Factors) -> float:
        """Σ of the elementwise product of the two differences: tr((U₁ᵀU₂)(D₂D₁ᵀ)), in fp64."""
        ups, downs = self.up.double().T @ other.up.double(), self.down.double() @ other.down.double().T
        return float((ups * downs).sum())

    def norm(self) -> float:
        """The Frobenius norm of the difference."""
        return max(self.inner(self), 0.0) ** 0.5

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The singular value decomposition of the difference, with n = min(out, r, in · k · k) values.

        U [out, n], σ [n] from the largest down, Vᵀ [n, in · k · k].

        From the QR of both factors, up = Q₁ R₁ and downᵀ = Q₂ R₂, and the SVD of R₁ R₂ᵀ, at most [r, r].
        """
        left, upper = torch.linalg.qr(self.up)
        right, lower = torch.linalg.qr(self.down.T)
        u, values, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        return left @ u, values, vh @ right.T

    def values(self) -> Tensor:
        """The singular values of the difference, from the largest down; fp32."""
        upper = torch.linalg.qr(self.up, mode="r").R
        lower = torch.linalg.qr(self.down.T, mode="r").R
        values: Tensor = torch.linalg.svdvals(upper @ lower.T)
        return values

    def tensors(self, *, alpha: float | None = None) -> dict[str, Tensor]:
        """As a file has them, fp32. `alpha`: None for the rank; `up` is divided by what it multiplies."""
        shapes = pair_shapes(self.shape, self.rank)
        alpha = float(self.rank) if alpha is None else alpha
        return {
            "alpha": torch.tensor(alpha),
            DOWN: self.down.reshape(tuple(shapes[DOWN])),
            UP: (self.up * (self.rank / alpha)).reshape(tuple(shapes[UP])),
        }


def factors_of(tensors: Mapping[str, Tensor]) -> Factors:
    """Those of a file's layer, a LoRA with or without a Tucker core."""
    shape = (len(tensors[UP]), tensors[DOWN].shape[1], *tensors[MID if MID in tensors else DOWN].shape[2:])
    down, up = LoRA.matrices(tensors, shape)
    rank = LoRA.rank_of(tensors)
    scale = LoRA.scale_for(float(tensors.get("alpha", torch.tensor(rank))), rank)
    return Factors(up * scale, down, shape)


def truncated(factors: Factors, rank: int) -> Factors:
    """The best approximation of this rank in the Frobenius norm (Eckart, Young 1936), σ shared out evenly."""
    left, values, right = factors.decomposed()
    root = values[:rank].sqrt()
    return Factors(left[:, :rank] * root, root[:, None] * right[:rank], factors.shape)


def largest(delta: Tensor, rank: int, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a dense difference [m, n], up to `rank` of them: U [m, r], σ [r], Vᵀ [r, n]; fp32.

    By the exact decomposition, or, where the matrix is large and the rank a small part of it, by a randomised one with
    twice as many directions and eight power iterations (Halko, Martinsson, Tropp 2011, arXiv 0909.4061), whose
    random numbers are the same each time.
    """
    rank = min(rank, *delta.shape)
    if exact or min(delta.shape) < max(_LARGE, _SMALL * rank):
        left, values, right = torch.linalg.svd(delta.float(), full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(delta.float(), q=max(2 * rank, rank + 8), niter=_ITERATIONS)
    return left[:, :rank], values[:rank], right[:, :rank].T


def of_matrix(delta: Tensor, shape: Sequence[int], rank: int, *, exact: bool = False) -> Factors:
    """The best approximation of a dense difference, [out, in · k · k], by factors of this rank; see `largest`."""
    left, values, right = largest(delta, rank, exact=exact)
    root = values.sqrt()
    return Factors(left * root, root[:, None] * right, tuple(shape))


def same_shape(parts: Sequence[Factors], where: str) -> tuple[int, ...]:
    """The shape of the layer of these. `UserError`, which begins with `where`, for those of different layers."""
    shapes = {part.shape for part in parts}
    if len(shapes) != 1:
        raise UserError(f"{where}: its weight has the shapes {' and '.join(str(list(one)) for one in sorted(shapes))}")
    return parts[0].shape


def stacked(parts: Sequence[Factors], where: str) -> Factors:
    """The sum of several differences, exactly: the factors beside each other, ranks add up. Raises as `same_shape`."""
    shape = same_shape(parts, where)
    return Factors(torch.cat([part.up for part in parts], dim=1), torch.cat([part.down for part in parts]), shape)
