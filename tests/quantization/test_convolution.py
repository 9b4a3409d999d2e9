"""Frozen convolutions of large weights, on a CPU computed as products of matrices."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input

from library.quantization import convolution
from library.quantization.convolution import LARGE, convolve, input_gradient


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(
    ("inputs", "out", "kernel", "stride", "padding", "dilation", "size"),
    [
        (12, 64, 3, 1, 1, 1, (4, 4)),
        (12, 64, 3, 2, 1, 1, (5, 4)),
        (12, 96, 1, 1, 0, 1, (3, 4)),
        (6, 96, 3, 1, 2, 2, (4, 3)),
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_torchs(
    dtype: torch.dtype,
    bound: float,
    inputs: int,
    out: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    size: tuple[int, int],
    biased: bool,
) -> None:
    """Against float64. bf16 rounds to 2**-9; the gradient adds up to nine rounded products."""
    torch.manual_seed(0)
    x = torch.randn(2, inputs, *size).to(dtype)
    weight = torch.randn(out, inputs, kernel, kernel).to(dtype)
    bias = torch.randn(out).to(dtype) if biased else None
    shape = ((stride,) * 2, (padding,) * 2, (dilation,) * 2, 1)
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), *shape)
    gradient = torch.randn(exact.shape).to(dtype)
    backward = conv2d_input(x.shape, weight.double(), gradient.double(), *shape)
    with mock.patch.object(convolution, "_pays", return_value=True):
        found, back = convolve(x, weight, bias, shape), input_gradient(x.shape, weight, gradient, shape)
    for ours, theirs in ((found, exact), (back, backward)):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


def test_it_is_for_large_weights_and_small_images() -> None:
    def product(weight: torch.Tensor, size: int, padding: int | str = 1, groups: int = 1) -> bool:
        x = torch.empty(1, weight.shape[1] * groups, size, size, device=weight.device)
        with mock.patch("torch.nn.functional.conv2d", side_effect=InterruptedError):
            try:
                convolve(
                    x, weight, None, ((1, 1), padding if isinstance(padding, str) else (padding,) * 2, (1, 1), groups)
                )
            except InterruptedError:
                return False
        return True

    large = torch.empty(512, 256, 3, 3)
    assert large.numel() >= LARGE
    assert product(large, 8)
    assert product(large, 11)  # 121 places, four times as many channels
    assert not product(large, 12)
    assert not product(torch.empty(512, 128, 3, 3), 4)
    assert not product(large, 8, padding="same")
    assert not product(large, 8, groups=2)
    assert not product(large.to("meta"), 8)
