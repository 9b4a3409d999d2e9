"""DoRA on LoRA, and LoRA with a Tucker core: the paper's formula, LyCORIS and PEFT."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from adapter_models import randomize
from torch import Tensor, nn

from library.quantization import FORMATS
from library.quantization.frozen import decoded
from networks.dora import DoRA
from networks.lora import DOWN, MID, UP, LoRA
from networks.magnitude import Axis, Form, low_rank_squares, norms_of
from networks.sites import Site
from tests.frozen import held

LAYERS = {
    "linear": lambda: nn.Linear(12, 10),
    "linear without bias": lambda: nn.Linear(12, 10, bias=False),
    "1x1": lambda: nn.Conv2d(12, 10, 1),
    "3x3": lambda: nn.Conv2d(12, 10, 3, stride=2, padding=1),
}
AXES: tuple[Axis, ...] = ("output", "input")


def layer_of(name: str) -> nn.Linear | nn.Conv2d:
    torch.manual_seed(0)
    return LAYERS[name]().requires_grad_(False)  # type: ignore[no-any-return]


def pixels(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((5, 7, 12) if isinstance(layer, nn.Linear) else (2, 12, 6, 6), generator=generator)


def adapter_on(layer: Any, form: Form, *, rank: int = 3, alpha: float = 1.5, **more: Any) -> LoRA:
    kind = LoRA if form.axis is None else DoRA
    return kind(Site("lora_unet_x", "unet", "unet", layer), rank=rank, alpha=alpha, form=form, seed=1, **more)


def papers_weight(weight: Tensor, delta: Tensor, scale: Tensor, axis: Axis) -> Tensor:
    """g * (W + delta) / |W + delta|, the norm a constant, in float64."""
    direction = weight + delta
    other = [place for place in range(weight.ndim) if place != AXES.index(axis)]
    norm = direction.detach().square().sum(dim=other, keepdim=True).sqrt()
    return scale * direction / norm


def run(layer: nn.Linear | nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x.double(), weight, bias)
    return nn.functional.conv2d(x.double(), weight, bias, layer.stride, layer.padding)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_those_of_the_papers_formula(name: str, axis: Axis) -> None:
    layer = layer_of(name)
    adapter = adapter_on(layer, Form(axis))
    randomize(adapter, 0.3)
    adapter.attach()
    x = pixels(layer).requires_grad_()
    tensors = {key: tensor.detach().double().requires_grad_() for key, tensor in adapter.named_parameters()}
    up, down = tensors[UP].flatten(1), tensors[DOWN].flatten(1)
    delta = (up @ down).view(layer.weight.shape) * 0.5
    exact_x = x.detach().double().requires_grad_()
    exact = run(layer, papers_weight(layer.weight.double(), delta, tensors["dora_scale"], axis), exact_x)
    exact.square().sum().backward()
    output = layer(x)
    output.square().sum().backward()
    # fp32 sums of at most 12 * 9 products and their gradients: 1e-5 of the largest value
    pairs = [(output, exact), (x.grad, exact_x.grad)]
    pairs += [(adapter.get_parameter(key).grad, tensor.grad) for key, tensor in tensors.items()]
    for ours, wanted in pairs:
        assert ours is not None
        assert wanted is not None
        assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_no_bit(name: str, axis: Axis, dtype: torch.dtype) -> None:
    layer = layer_of(name).to(dtype)
    with torch.no_grad():
        layer.weight[0] = 0  # a row of zeros stays zeros
    x = pixels(layer).to(dtype)
    expected = layer(x)
    adapter = adapter_on(layer, Form(axis))
    adapter.attach()
    assert torch.equal(layer(x), expected)
    assert adapter.export()["dora_scale"].shape == norms_of(layer.weight, axis).shape


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("multiplier", [1.0, 0.4, -0.5])
@pytest.mark.parametrize("name", LAYERS)
def test_merged_as_in_the_forward(name: str, axis: Axis, multiplier: float) -> None:
    layer = layer_of(name)
    adapter = adapter_on(layer, Form(axis))
    randomize(adapter, 0.3)
    adapter.set_multiplier(multiplier)
    adapter.attach()
    x = pixels(layer)
    expected = layer(x)
    adapter.detach()
    merged = deepcopy(layer)
    merged.weight.data = adapter.effective_weight(layer.weight, adapter.tensors(), multiplier).detach()
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", LAYERS)
def test_lycoris_gives_the_same_from_the_same_tensors(name: str, axis: Axis) -> None:
    from lycoris.modules.locon import LoConModule

    layer = layer_of(name)
    adapter = adapter_on(layer, Form(axis))
    randomize(adapter, 0.3)
    theirs = LoConModule("x", layer, 1.0, 3, 1.5, weight_decompose=True, wd_on_out=axis == "output", bypass_mode=False)
    own = theirs.state_dict()
    assert {key: tuple(value.shape) for key, value in own.items()} == {
        key: tuple(value.shape) for key, value in adapter.export().items()
    }
    with torch.no_grad():
        for key, tensor in adapter.export().items():
            theirs.get_parameter(key).copy_(tensor) if key != "alpha" else None
    x = pixels(layer)
    expected = theirs(x)
    adapter.attach()
    # the eps that LyCORIS adds to norms, 1e-7, and another order of fp32 sums
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "3x3"])
def test_peft_gives_the_same_from_the_same_tensors(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    layer = layer_of(name)
    adapter = adapter_on(layer, Form("output"))
    randomize(adapter, 0.3)
    model = nn.Sequential()
    model.add_module("layer", deepcopy(layer))
    theirs: Any = get_peft_model(model, LoraConfig(r=3, lora_alpha=1.5, use_dora=True, target_modules=["layer"]))
    wrapped = theirs.base_model.model.layer
    with torch.no_grad():
        wrapped.lora_A.default.weight.copy_(adapter.lora_down.weight)
        wrapped.lora_B.default.weight.copy_(adapter.lora_up.weight)
        magnitude = wrapped.lora_magnitude_vector.default.weight
        magnitude.copy_(adapter.dora_scale.reshape(magnitude.shape))
    x = pixels(layer)
    expected = theirs(x)
    expected.square().sum().backward()
    adapter.attach()
    output = layer(x)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)  # another order of fp32 sums
    for ours, gradient in (
        (adapter.lora_down.weight.grad, wrapped.lora_A.default.weight.grad),
        (adapter.lora_up.weight.grad, wrapped.lora_B.default.weight.grad),
        (adapter.dora_scale.grad, magnitude.grad),
    ):
        assert ours is not None
        torch.testing.assert_close(ours, gradient.reshape(ours.shape), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", LAYERS)
def test_norms_come_without_the_delta(name: str, axis: Axis) -> None:
    layer = layer_of(name)
    generator = torch.Generator().manual_seed(5)
    down = torch.randn(3, *layer.weight.shape[1:], generator=generator)
    up = torch.randn(10, 3, generator=generator)
    more = low_rank_squares(layer.weight, down, up, 0.7, axis)
    whole = layer.weight.double() + 0.7 * (up @ down.flatten(1)).view(layer.weight.shape).double()
    exact = whole.square().sum([place for place in range(whole.ndim) if place != AXES.index(axis)]).sqrt()
    ours = (norms_of(layer.weight, axis).flatten().square() + more).sqrt()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_base(axis: Axis, format: str) -> None:
    """The norms are those of the rounded weight, and the product with it may be rounded to bf16."""
    layer = layer_of("linear")
    rounded = deepcopy(layer)
    rounded.weight.data = decoded(held(layer, format).weight, torch.float32)
    x = pixels(layer)
    outputs = []
    for one in (layer, rounded):
        adapter = adapter_on(one, Form(axis))
        randomize(adapter, 0.3)
        adapter.attach()
        outputs.append(one(x))
    # the cross term of |W + delta|² is off by 2^-8 of itself at most, and is at most as large as the norm
    assert (outputs[0] - outputs[1]).abs().max() <= 2**-8 * outputs[1].abs().max()


def test_the_norm_is_formed_once_for_each_state_of_the_tensors() -> None:
    adapter = adapter_on(layer_of("linear"), Form("output"))
    first = adapter.norm_along()
    assert adapter.norm_along() is first
    with torch.no_grad():
        adapter.lora_up.weight.add_(1)
    second = adapter.norm_along()
    assert not torch.equal(first, second)
    adapter.before_batch()
    assert adapter.norm_along() is not second


def test_a_row_scale_without_its_axis_is_read() -> None:
    adapter = adapter_on(layer_of("3x3"), Form("output"))
    tensors = adapter.export()
    read = adapter.completed({**tensors, "dora_scale": tensors["dora_scale"].flatten()})
    assert torch.equal(read["dora_scale"], tensors["dora_scale"])
    assert DoRA.form_in(adapter.site, {"dora_scale": torch.ones(10)}) == Form("output")
    assert DoRA.form_in(adapter.site, {"dora_scale": torch.ones(1, 12, 1, 1)}) == Form("input")


# -- a Tucker core


@pytest.fixture
def tucker() -> LoRA:
    adapter = adapter_on(layer_of("3x3"), Form(tucker=True))
    randomize(adapter, 0.5)
    return adapter


def test_tucker_is_its_sum(tucker: LoRA) -> None:
    tensors = {key: tensor.detach().double() for key, tensor in tucker.named_parameters()}
    exact = torch.einsum("op,pqhw,qi->oihw", tensors[UP][..., 0, 0], tensors[MID], tensors[DOWN][..., 0, 0]) * 0.5
    torch.testing.assert_close(tucker.delta().double(), exact, rtol=1e-5, atol=1e-6)
    layer, x = tucker.site.module, pixels(tucker.site.module)
    expected = run(layer, layer.weight.double() + exact, x)
    tucker.attach()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_lycoris_reads_a_tucker_core_alike(tucker: LoRA) -> None:
    from lycoris.modules.locon import LoConModule

    theirs = LoConModule("x", tucker.site.module, 1.0, 3, 1.5, use_tucker=True, bypass_mode=False)
    assert {key: tuple(value.shape) for key, value in theirs.state_dict().items()} == {
        key: tuple(value.shape) for key, value in tucker.export().items()
    }
    with torch.no_grad():
        for key, tensor in tucker.named_parameters():
            theirs.get_parameter(key).copy_(tensor)
    x = pixels(tucker.site.module)
    expected = theirs(x)
    tucker.attach()
    torch.testing.assert_close(tucker.site.module(x), expected, rtol=1e-4, atol=1e-4)


def test_only_wide_kernels_get_a_core() -> None:
    from networks.settings import RankSettings, TuckerSizes

    sizes = TuckerSizes(use_tucker=True)
    for name, expected in (("linear", False), ("1x1", False), ("3x3", True)):
        site = Site("x", "unet", "unet", layer_of(name))
        form = LoRA.form_for(site, 3, sizes, RankSettings())
        assert form.tucker is expected
