"""Each format of frozen weights: its error against closed-form bounds, its layers against autograd, what it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.config.registry import load
from library.errors import UserError
from library.guidance.estimate import parameter_bytes, peak_of
from library.models.opening import open_family
from library.quantization import BYTES, FORMATS
from library.quantization.fp8 import FLOAT8
from library.quantization.frozen import Held, compute_frozen, decoded
from library.quantization.packed import PackedWeight
from tests.frozen import held

PACKED = [name for name in FORMATS if name != "fp8"]
LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (3, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 20, bias=False), (3, 12)),
    "odd linear": (lambda: nn.Linear(13, 7), (3, 13)),
    "one output": (lambda: nn.Linear(3, 1), (2, 3)),
    "conv 3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 9)),
    "odd conv": (lambda: nn.Conv2d(5, 7, 3, padding=1), (1, 5, 6, 7)),
    "conv stride 2": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "conv 1": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
}


def packed(weight: Tensor, format: str) -> Tensor:
    pack: Callable[[Tensor], Tensor] = load(FORMATS, format, where="here")
    return pack(weight)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def relative(weight: Tensor, format: str) -> float:
    return ((packed(weight, format).float() - weight).norm() / weight.norm()).item()


# -- the error -------------------------------------------------------------------------------------------------------


def test_eight_bits_are_off_by_half_a_unit_in_the_last_place() -> None:
    weight = normal(64, 640)
    off = (packed(weight, "fp8").float() - weight).abs()
    assert (off <= (weight.abs() / 16).clamp(min=2**-10)).all()
    scale = weight.abs().amax(1, keepdim=True) / 448
    off = (packed(weight, "fp8_scaled").float() - weight).abs()
    # fp32 rounds the quotient and the product
    assert (off <= (weight.abs() / 16).maximum(scale * 2**-10) * (1 + 1e-6)).all()
    off = (packed(weight, "int8").float() - weight).abs()
    assert (off <= weight.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).all()


def test_the_mean_error_of_normal_weights_is_that_of_the_formula() -> None:
    weight = normal(256, 1024)
    # a uniform error within a step of absmax / 127
    step = weight.abs().amax(1, keepdim=True) / 127
    assert relative(weight, "int8") == pytest.approx((step.square().mean() / 12).sqrt().item() / 0.02, rel=0.01)
    # e4m3 within a power of two: steps of 2^e / 8, and ∫ over the binades of a normal distribution
    sigma = 0.02 / step.mean().item() / 127 * 448
    edges = 2.0 ** torch.arange(-6, 10).double() / sigma
    within = torch.erf(edges / 2**0.5)
    squares = ((within[1:] - within[:-1]) * (edges[:-1] / 8).square() / 12).sum()
    assert relative(weight, "fp8_scaled") == pytest.approx(squares.sqrt().item(), rel=0.05)
    assert relative(weight, "fp8_scaled") < relative(weight, "fp8")


def test_nf4_is_bitsandbytes() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for shape in ((96, 64), (1030, 1030), (6, 4, 3, 3)):  # the second in two goes, with a last block that is not full
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = normal(*shape, dtype=dtype)
            codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
            ours = packed(weight, "nf4")
            assert torch.equal(ours.codes, codes)
            assert torch.equal(ours.absmax, state.absmax)
            # kernels of bitsandbytes for flat and for other shapes multiply in another order
            torch.testing.assert_close(ours.decode(), dequantize_4bit(codes, state), rtol=2**-7, atol=1e-8)


def test_the_error_of_nf4_is_at_most_half_the_widest_gap() -> None:
    weight = normal(64, 640)
    blocks = weight.flatten().view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    off = (packed(weight, "nf4").float() - weight).flatten().view(-1, 64).abs()
    # the codes' widest gap is from -1 to -0.6962; double quantisation moves absmax by at most 1/64 of the largest
    # deviation from the mean among 256 of them
    moved = (absmax - absmax.mean()).abs().max() / 64
    assert (off <= absmax * (1 - 0.6961) / 2 + moved).all()
    assert relative(weight, "nf4") == pytest.approx(0.092, abs=0.003)  # measured, QLoRA's blocks of 64


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_zeros_and_large_weights_finite(format: str, dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 65, dtype=dtype)
    weight[1, 4] = 400
    weight[2, 7] = 1e-7
    answer = packed(weight, format).to(torch.float32)
    assert answer.isfinite().all()
    assert not answer[0].any()
    assert answer[1, 4] == pytest.approx(400, rel=0.07)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(format: str, value: float) -> None:
    weight = torch.ones(2, 66)
    weight[1, 65] = value
    with pytest.raises(UserError, match=r"NaN or infinite weights|beyond 448"):
        packed(weight, format)


# -- the tensor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("shape", [(7, 13), (6, 4, 3, 3), (1, 1)])
def test_it_looks_like_the_weight(format: str, shape: tuple[int, ...]) -> None:
    weight = packed(normal(*shape, dtype=torch.bfloat16), format)
    assert isinstance(weight, PackedWeight)
    plain = weight.decode()
    assert type(plain) is Tensor
    assert (weight.shape, weight.dtype, weight.device, weight.is_meta) == (shape, torch.bfloat16, plain.device, False)
    assert torch.equal(weight.float(), plain.float())
    assert torch.equal(weight.flatten(1), plain.flatten(1))
    assert torch.equal(weight[0], plain[0])
    assert torch.equal(weight + 1, plain + 1)
    assert torch.equal(torch.cat([weight, plain]), torch.cat([plain, plain]))
    for same in (weight.detach(), weight.clone(), weight.to("cpu"), weight.to("cpu", copy=True), copy.deepcopy(weight)):
        assert type(same) is type(weight)
        assert torch.equal(same.decode(), plain)
    with pytest.raises(TypeError, match="a packed weight cannot be written to"):
        weight.zero_()
    outline = weight.to("meta")
    assert outline.is_meta
    assert all(part.is_meta for part in outline.parts.values())


@pytest.mark.parametrize("format", PACKED)
def test_a_module_can_be_moved(format: str) -> None:
    layer = held(nn.Linear(66, 5, dtype=torch.bfloat16), format)
    before = layer.weight.decode()
    layer.to("cpu")
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
    assert torch.equal(layer.weight.decode(), before)
    layer.to("meta")
    assert isinstance(layer.weight, PackedWeight)
    assert layer.weight.is_meta


@pytest.mark.parametrize(("format", "bits"), [("fp8", 8), ("fp8_scaled", 8.05), ("int8", 8.05), ("nf4", 4.15)])
def test_the_bytes_are_those_of_the_parts(format: str, bits: float) -> None:
    layer = held(nn.Linear(1280, 640, bias=False, dtype=torch.bfloat16), format)
    assert bits * 0.99 < 8 * parameter_bytes([layer]) / (1280 * 640) <= bits


@pytest.mark.parametrize("format", FORMATS)
def test_the_bytes_that_are_planned_are_those_of_the_weight(format: str) -> None:
    """But for nf4's table of what the codes of its scales mean, 256 numbers in fp32, and their offset."""
    layer = held(nn.Linear(512, 1024, bias=False, dtype=torch.bfloat16), format)
    more = 4 * 257 if format == "nf4" else 0
    assert parameter_bytes([layer]) == BYTES[format](512 * 1024, 1024) + more


# -- the layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_layer_acts_as_one_whose_weights_were_rounded(
    format: str, name: str, dtype: torch.dtype, autocast: bool
) -> None:
    """And its input gets autograd's gradient."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, rounded = make().to(dtype), make().to(dtype)
    rounded.load_state_dict(layer.state_dict())
    held(layer, format)
    assert layer.bias is None or layer.bias.dtype == dtype
    rounded.weight.data = decoded(layer.weight, dtype)
    answers, gradients = [], []
    inputs = torch.randn(shape, dtype=torch.float32 if autocast else dtype)
    for module in (layer, rounded):
        x = inputs.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            answer = module(x)
        answer.backward(torch.ones_like(answer))
        answers.append(answer)
        gradients.append(x.grad)
    assert gradients[0].dtype == inputs.dtype
    exact = answers[0].dtype == torch.float32
    for pair in (answers, gradients):  # summed in fp32, in whatever order, then rounded to bf16 once: 2⁻⁸ at most
        torch.testing.assert_close(*pair, rtol=1e-5 if exact else 2**-7, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["linear", "conv 3"])
def test_the_backward_pass_keeps_the_packed_weight_alone(format: str, name: str) -> None:
    make, shape = LAYERS[name]
    layer = held(make().to(torch.bfloat16), format)
    kept: list[Tensor] = []
    x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        answer = layer(x)
    assert [(type(tensor), tensor.dtype) for tensor in kept] == [(type(layer.weight), layer.weight.dtype)]
    assert len(kept) == 1
    answer.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", [name for name in LAYERS if "conv" in name])
def test_a_frozen_convolution_has_the_bits_of_torchs(name: str, dtype: torch.dtype, autocast: bool) -> None:
    """And keeps nothing but its weight, where torch keeps the input as well."""
    make, shape = LAYERS[name]
    own = make().to(dtype).requires_grad_(False)
    ours = copy.deepcopy(own)
    compute_frozen(ours)
    x = torch.randn(shape, dtype=torch.float32 if autocast else dtype)
    found, kept = [], []
    for layer in (own, ours):
        given, tensors = x.clone().requires_grad_(), []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t, to=tensors: to.append(t) or t, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            answer = layer(given)
        answer.square().sum().backward()
        found.append((answer, given.grad))
        kept.append([tuple(tensor.shape) for tensor in tensors])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert shape in kept[0]
    assert kept[1] == [tuple(own.weight.shape)]


@pytest.mark.parametrize("format", PACKED)
def test_memory_is_estimated_without_computing(format: str) -> None:
    """Of a layer alone: its output, the gradients of that and of the input, and the decoded weight once."""
    layer = held(nn.Linear(640, 1280, bias=False, dtype=torch.bfloat16), format)

    def work(fake: Callable[[Tensor], Tensor]) -> None:
        layer(fake(torch.zeros(4, 640, dtype=torch.bfloat16)).requires_grad_()).sum().backward()

    decoded = 640 * 1280 * 2
    # fp32 on the way: codes times scale
    assert decoded < peak_of(work) < decoded * (3.2 if format != "nf4" else 1.2)


# -- a model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_model(tiny_sdxl: Path, format: str) -> None:
    """Linear, 1 × 1 and wide convolutions of the UNet; the attention and MLP of two encoders of three layers."""
    family = open_family(str(tiny_sdxl))
    parts = family.components
    names = ("denoiser", *parts.text_encoders)
    noisy, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    sizes: dict[str, Any] = {"original_sizes": [(64, 64)], "crops": [(0, 0)], "target_size": (64, 64)}

    def answer() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return family.predict(noisy, t, family.condition(family.encode_prompts(["a cat"]), **sizes)).float()

    parts.load_all(names, torch.bfloat16, "cpu")
    before, whole = answer(), parameter_bytes([parts["denoiser"]])
    plain = {name: dict(parts[name].named_parameters()) for name in names}
    for name in names:
        parts.load(name, torch.bfloat16, "cpu", held=Held(format, "--base_format"))
    packed_ones = {
        name: [path for path, weight in parts[name].named_parameters() if is_packed(weight)] for name in names
    }
    assert [len(paths) for paths in packed_ones.values()] == [192 + 65, 18, 18]
    for name, paths in packed_ones.items():
        for path in paths[::7]:
            alone = packed(plain[name][path].detach(), format)
            assert torch.equal(parts[name].get_parameter(path).float(), alone.float())
    for kept in ("conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"):
        assert parts["denoiser"].get_submodule(kept).weight.dtype == torch.bfloat16
    assert parameter_bytes([parts["denoiser"]]) < (0.5 if format == "nf4" else 0.6) * whole  # tiny layers
    # diffusers casts prompts to these
    assert parts["denoiser"].dtype == parts["text_encoder_2"].dtype == torch.bfloat16
    difference = (answer() - before).norm() / before.norm()
    assert 0 < difference < 0.5


def is_packed(weight: Tensor) -> bool:
    return isinstance(weight, PackedWeight) or weight.dtype == FLOAT8
