"""The full difference and the norms against their formulas and LyCORIS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from single_layers import LAYERS, fill, inputs, layer, same_as_lycoris, site
from torch import nn

from networks.create import create
from networks.difference import Form
from networks.full import Full
from networks.norm import Norm
from networks.settings import Asked
from networks.sites import find_norms


def full(form: str, scale: float = 0.2) -> Full:
    module = layer(form)
    adapter = Full(site(module), form=Form(module.bias is not None))
    fill(adapter, scale)
    return adapter


def norm(name: str, scale: float = 0.2) -> Norm:
    torch.manual_seed(3)
    module = nn.GroupNorm(2, 8) if name == "group" else nn.LayerNorm(8, bias=name == "layer")
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_()
    adapter = Norm(site(module), form=Form(module.bias is not None))
    fill(adapter, scale)
    return adapter


NORMS = ("layer", "layer without bias", "group")


def x_of(adapter: Full | Norm) -> torch.Tensor:
    return torch.randn(2, 8, 5, 5) if isinstance(adapter.site.module, nn.GroupNorm) else inputs(adapter.site.module)


@pytest.mark.parametrize("make", [*((full, form) for form in LAYERS), *((norm, form) for form in NORMS)])
def test_the_output_and_its_gradient_are_those_of_the_sums(make: Any) -> None:
    adapter = make[0](make[1])
    adapter.set_multiplier(0.7)
    module, x = adapter.site.module, x_of(adapter)
    names = dict(zip(("weight", "bias"), adapter.named_parameters(), strict=False))
    double = {name: value.detach().double().requires_grad_() for name, value in adapter.named_parameters()}
    sums = {name: module.get_parameter(name).double() + 0.7 * double[own] for name, (own, _) in names.items()}
    exact = torch.func.functional_call(module, sums, x.double())
    torch.testing.assert_close(adapter(x).double(), exact, rtol=1e-5, atol=1e-6)  # fp32 has 7 digits
    towards = torch.randn(exact.shape, generator=torch.Generator().manual_seed(6))
    (adapter(x) * towards).sum().backward()
    (exact * towards).sum().backward()
    for name, value in adapter.named_parameters():
        torch.testing.assert_close(value.grad.double(), double[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize("multiplier", [1.0, 0.6])
def test_it_is_lycoris_full(form: str, multiplier: float) -> None:
    lycoris = pytest.importorskip("lycoris.modules.full")
    adapter = full(form)
    # LyCORIS folds the weight into its own module when it is applied: the outputs are compared, not the gradients
    other = lycoris.FullModule("x", layer(form), multiplier)
    with torch.no_grad():
        other.weight.copy_(adapter.diff)
        if adapter.form.bias:
            other.bias.copy_(adapter.diff_b)
    weight, bias = other.get_merged_weight(multiplier)
    module = adapter.site.module
    torch.testing.assert_close(adapter.effective_weight(module.weight, adapter.tensors(), multiplier), weight)
    if bias is not None:
        torch.testing.assert_close(adapter.effective_bias(module.bias, adapter.tensors(), multiplier), bias)


@pytest.mark.parametrize("name", ["layer", "group"])
@pytest.mark.parametrize("multiplier", [1.0, 0.6])
def test_it_is_lycoris_norm(name: str, multiplier: float, monkeypatch: Any) -> None:
    lycoris = pytest.importorskip("lycoris.modules.norms")
    adapter = norm(name)
    torch.manual_seed(1)
    x = x_of(adapter)
    monkeypatch.setattr("single_layers.inputs", lambda module: x)
    same_as_lycoris(lycoris.NormModule, adapter, multiplier)


@pytest.mark.parametrize("make", [(full, "linear"), (full, "3x3"), (norm, "layer"), (norm, "group")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_16_bits_a_small_difference_is_not_rounded_away(make: Any, dtype: torch.dtype) -> None:
    """1e-4 beside weights of about 1, where bf16 has steps of 4e-3 and more: added to the weight it would vanish."""
    adapter = make[0](make[1], 1e-4)
    adapter.site.module.to(dtype)
    x = x_of(adapter).to(dtype)
    expected = adapter.share(x)
    assert torch.equal(adapter(x), expected + adapter.base_forward(x))
    exact = make[0](make[1], 1e-4).share(x.float())
    torch.testing.assert_close(expected.float(), exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


def test_on_top_of_another_adapter_it_keeps_that_ones_share() -> None:
    below, above = full("linear"), None
    below.attach()
    above = Full(below.site, form=Form(bias=True))
    above.attach()
    x = inputs(below.site.module)
    assert torch.equal(below.site.module(x), below(x))  # a new one adds nothing
    fill(above)
    above.detach()
    below.detach()


@pytest.mark.parametrize(("conv", "sd15", "sdxl"), [(False, 64, 221), (True, 108, 255)])
def test_the_norms_are_those_that_lycoris_finds(conv: bool, sd15: int, sdxl: int, true_sizes: Any) -> None:
    """Its presets attn-mlp and full, without text encoders."""
    found = {name: find_norms(true_sizes[name], conv=conv) for name in ("sd15", "sdxl")}
    assert {name: len(sites) for name, sites in found.items()} == {"sd15": sd15, "sdxl": sdxl}
    assert all(site.part == "unet" for sites in found.values() for site in sites)
    assert len({site.name for site in found["sdxl"]}) == sdxl
    names = {site.name for site in found["sd15"]}
    assert "lora_unet_down_blocks_0_attentions_0_norm" in names
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm3" in names
    assert ("lora_unet_down_blocks_0_resnets_0_norm1" in names) == conv
    assert ("lora_unet_input_blocks_1_0_in_layers_0" in {site.name for site in found["sdxl"]}) == conv
    network = create("norm", true_sizes["sd15"], Asked(), {"enable_conv": conv})
    assert network.counts() == {"unet": sd15}
