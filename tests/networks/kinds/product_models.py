"""What the tests of LoHa, LoKr and GLoRA share: adapters on single layers, ours and LyCORIS'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from networks import kinds
from networks.adapter import WithRank
from networks.settings import Asked
from networks.sites import Site

# By name: (layer, shape of its input). Sizes that no two axes share, and one square layer
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 40), (2, 7, 24)),
    "square": (lambda: nn.Linear(36, 36, bias=False), (3, 36)),
    "conv1x1": (lambda: nn.Conv2d(24, 40, 1), (2, 24, 5, 4)),
    "conv3x3": (lambda: nn.Conv2d(24, 40, 3, stride=2, padding=1), (2, 24, 6, 5)),
}


def layer_and_input(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear | nn.Conv2d, Tensor]:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().to(dtype).requires_grad_(False)
    return layer, torch.randn(shape).to(dtype)


def on_layer(
    kind: str,
    layer: nn.Module,
    *,
    dim: int = 3,
    alpha: float = 1.5,
    settings: dict[str, Any] | None = None,
    dropout: float | None = None,
    **sizes: Any,
) -> WithRank:
    """A new adapter of a kind, attached."""
    made = kinds.load(kind)
    adapter = made.new(
        Site("lora_unet_x", "unet", "unet", layer),
        Asked(dim=dim, alpha=alpha, seed=1, dropout=dropout),
        made.SIZES(conv_dim=dim, conv_alpha=alpha, **sizes),
        made.SETTINGS(**(settings or {})),
        None,
    )
    assert isinstance(adapter, WithRank)
    adapter.attach()
    return adapter


def on_layer_from(kind: str, layer: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """An adapter with a file's tensors, attached."""
    made = kinds.load(kind)
    adapter = made.as_in_file(Site("lora_unet_x", "unet", "unet", layer), tensors, Asked(), made.SETTINGS())
    adapter.to(dtype)
    adapter.load_state_dict(adapter.completed(tensors))
    adapter.attach()
    return adapter


def of_lycoris(kind: str, layer: nn.Module, *, dim: int = 3, alpha: float = 1.5, **arguments: Any) -> Any:
    """LyCORIS' module on a layer, applied, with random weights."""
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    names = {"dora_wd": "weight_decompose", "wd_on_output": "wd_on_out"}
    arguments = {names.get(name, name): value for name, value in arguments.items()}
    made = {"loha": LohaModule, "lokr": LokrModule, "glora": GLoRAModule}[kind]
    module = made("x", layer, 1.0, dim, alpha, **arguments)
    randomize(module)
    module.apply_to()
    return module


def randomize(module: nn.Module, scale: float = 0.3) -> None:
    """Random values; norms of rows or channels, which are none below 0, move by a tenth."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("dora_scale"):
                parameter.mul_(1 + 0.1 * values)
            else:
                parameter.copy_(values * scale)


def check_against_formula(adapter: WithRank, x: Tensor, formula: Callable[[Any, Tensor], Tensor]) -> None:
    """Output, effective weight and gradients in fp32 against `formula(adapter, weight)` in float64.

    The bound, 2e-5 of the largest value, is a few hundred roundings of fp32; sums here have a few hundred terms.
    """
    randomize(adapter)
    layer, names = adapter.site.module, [name for name, _ in adapter.named_parameters()]
    x = x.requires_grad_()
    output = layer(x)
    found = torch.autograd.grad(output.square().sum(), [x, *adapter.parameters()])
    effective = adapter.effective_weight(layer.weight, adapter.tensors(), 1.0)
    adapter.detach()
    adapter.double()
    layer.double()
    exact_x = x.detach().double().requires_grad_()
    weight = formula(adapter, layer.weight)
    if isinstance(layer, nn.Conv2d):
        expected = nn.functional.conv2d(exact_x, weight, layer.bias, layer.stride, layer.padding)
    else:
        expected = nn.functional.linear(exact_x, weight, layer.bias)
    wanted = torch.autograd.grad(expected.square().sum(), [exact_x, *adapter.parameters()])
    for name, ours, exact in zip(
        ["output", "weight", "x", *names], [output, effective, *found], [expected, weight, *wanted], strict=True
    ):
        assert (ours.double() - exact).abs().max() <= 2e-5 * exact.abs().max(), name


def check_formula(kind: str, layer_name: str, form: dict[str, Any], formula: Callable[..., Any]) -> None:
    """A new adapter's output and gradients are those of a closed form, as `check_against_formula` has it."""
    adapter = on_layer(kind, layer_and_input(layer_name)[0], **form)
    check_against_formula(adapter, layer_and_input(layer_name)[1], formula)


def of_lycoris_file(kind: str, layer_name: str, form: dict[str, Any]) -> tuple[Any, Tensor, Tensor, dict[str, Tensor]]:
    """A layer, its input, its output with LyCORIS' module on it, and the tensors of that module as a file has them.

    Ours of the same form has the same names and shapes, which is checked here.
    """
    layer, x = layer_and_input(layer_name)
    theirs = of_lycoris(kind, layer, **form)
    expected = layer(x)
    theirs.restore()
    tensors = {name: tensor.detach().clone() for name, tensor in theirs.custom_state_dict().items()}
    new = on_layer(kind, layer, **form)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert {name: tuple(tensor.shape) for name, tensor in new.state_dict().items()} == shapes
    new.detach()
    return layer, x, expected, tensors


def check_against_lycoris(kind: str, layer_name: str, form: dict[str, Any]) -> None:
    """LyCORIS' own tensors, loaded as a file's. Both compute in fp32, in another order of operations."""
    layer, x, expected, tensors = of_lycoris_file(kind, layer_name, form)
    on_layer_from(kind, layer, tensors)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def check_norms(kind: str, layer_name: str, form: dict[str, Any]) -> None:
    """Nothing changes at the start; then the norms, for DoRA and of delta, are those of the matrices."""
    layer, x = layer_and_input(layer_name)
    adapter: Any = on_layer(kind, layer, **form)
    assert torch.equal(layer(x), adapter.base_forward(x))
    randomize(adapter)
    delta = adapter.delta()
    torch.testing.assert_close(adapter.norm(), delta.norm(), rtol=1e-5, atol=1e-6)
    if adapter.form.axis is not None:
        plain = adapter.product_of(adapter.tensors(), layer.weight.shape) * adapter.scale
        axis = 0 if adapter.form.axis == "output" else 1
        expected = (layer.weight + plain).movedim(axis, 0).flatten(1).norm(dim=1)
        torch.testing.assert_close(adapter.norm_along(), expected, rtol=1e-5, atol=1e-6)
    else:
        adapter.requires_grad_(False).shrink(0.25)
        torch.testing.assert_close(adapter.delta(), delta * 0.25, rtol=1e-5, atol=1e-7)
