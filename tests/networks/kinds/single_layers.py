"""What the tests of single kinds share: one layer of each form, and LyCORIS' module on a copy of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from networks.adapter import Adapter
from networks.sites import Site

LAYERS = ("linear", "linear without bias", "1x1", "3x3")


def layer(form: str, *, out: int = 12) -> Any:
    """Frozen, with 8 inputs, random weights and biases."""
    torch.manual_seed(3)
    made: Any
    if form.startswith("linear"):
        made = nn.Linear(8, out, bias=form == "linear")
    else:
        size = int(form[0])
        made = nn.Conv2d(8, out, size, padding=size // 2, stride=size // 2 + 1)
    return made.requires_grad_(False)


def site(module: nn.Module) -> Site:
    return Site("lora_unet_x", "unet", "unet", module, "x")  # type: ignore[arg-type]


def inputs(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    shape = (2, 8, 5, 5) if isinstance(module, nn.Conv2d) else (2, 3, 8)
    return torch.randn(shape, generator=generator)


def fill(adapter: nn.Module, scale: float = 0.2) -> None:
    """Random values in every parameter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def of_lycoris(cls: Any, adapter: Adapter, multiplier: float, **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """LyCORIS' module of this class with the adapter's tensors, and the copy of the layer that it acts on."""
    module = copy.deepcopy(adapter.site.module)
    vars(module).pop("forward", None)
    other = cls("x", module, multiplier, **arguments)
    expected = {name: tuple(tensor.shape) for name, tensor in weights(other).items()}
    assert {name: tuple(tensor.shape) for name, tensor in adapter.export().items()} == expected
    with torch.no_grad():
        for name, tensor in adapter.named_parameters():
            weights(other)[name].copy_(tensor)
    other.apply_to()
    return other.eval(), module


def weights(module: Any) -> dict[str, Tensor]:
    """By the names in files; LyCORIS calls the differences of `full` otherwise while it trains."""
    names = {"weight": "diff", "bias": "diff_b"} if type(module).__name__ == "FullModule" else {}
    return {names.get(name, name): tensor for name, tensor in module.state_dict(keep_vars=True).items()}


def same_as_lycoris(cls: Any, adapter: Adapter, multiplier: float, **arguments: Any) -> None:
    """Outputs and gradients of both. fp32 in another order of operations: 1e-5 of values of about 1."""
    other, theirs = of_lycoris(cls, adapter, multiplier, **arguments)
    adapter.attach()
    adapter.set_multiplier(multiplier)
    adapter.zero_grad()
    ours, x = adapter.site.module, inputs(adapter.site.module)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    for module in (ours, theirs):
        output = module(x)
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    for name, tensor in adapter.named_parameters():
        expected = weights(other)[name].grad
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    adapter.detach()
