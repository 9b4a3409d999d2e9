"""A convolution with a frozen weight and its gradient to the input; on a CPU as products of matrices, where that pays.

At each use torch's library for CPUs copies the weight into a layout of its own. For a large weight and a small image,
such as 1280 channels of 4 × 4 cells, that copy takes most of the time. A product of matrices reads the weight as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

Pair = tuple[int, ...]
Shape = tuple[Pair, str | Pair, Pair, int]  # a convolution's stride, padding, dilation and groups

LARGE = 2**20  # numbers in a weight: a smaller one's copy stays in the processor's cache
MANY = 4  # out channels for each place of the output: measured, with 1280 channels up to 16 × 16 cells


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """`F.conv2d`; x [B, in, H, W], weight [out, in, height, width]."""
    stride, padding, dilation, groups = shape
    if not _pays(x, weight, shape, _out_size(x.shape, weight, shape)):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    assert not isinstance(padding, str)
    height, width = _out_size(x.shape, weight, shape)
    columns = F.unfold(x, tuple(weight.shape[2:]), dilation, padding, stride).transpose(0, 1).flatten(1)  # [K, B L]
    matrix = weight.flatten(1)
    product = matrix @ columns if bias is None else torch.addmm(bias[:, None], matrix, columns)  # [out, B L]
    return product.view(len(weight), len(x), height, width).transpose(0, 1).contiguous()


def input_gradient(size: torch.Size, weight: Tensor, gradient: Tensor, shape: Shape) -> Tensor:
    """The gradient to the input, which has this size; gradient [B, out, h, w]."""
    stride, padding, dilation, _ = shape
    if not _pays(gradient, weight, shape, gradient.shape[2:]):
        return conv2d_input(size, weight, gradient, *shape)
    assert not isinstance(padding, str)
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, len(weight))  # [B L, out]
    columns_BKL = (rows @ weight.flatten(1)).view(size[0], -1, weight[0].numel()).transpose(1, 2)
    # up to 9 of them are added for each place of the input: in 16 bits that would round 8 times
    folded = F.fold(columns_BKL.float(), tuple(size[2:]), tuple(weight.shape[2:]), dilation, padding, stride)
    return folded.to(gradient.dtype)


def _pays(x: Tensor, weight: Tensor, shape: Shape, out: Pair) -> bool:
    """Whether products of matrices are faster: unfolding writes as many columns as the output has places, where the
    copy of the weight writes one for each out channel."""
    if x.device.type != "cpu" or shape[3] != 1 or isinstance(shape[1], str) or weight.numel() < LARGE:
        return False
    return MANY * x.shape[0] * out[0] * out[1] <= weight.shape[0]


def _out_size(size: torch.Size, weight: Tensor, shape: Shape) -> Pair:
    """Height and width of the output. With padding by a word they are not computed, nor needed."""
    stride, padding, dilation, _ = shape
    if isinstance(padding, str):
        return (0, 0)
    return tuple(
        (size[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
