"""(IA)³ against its formula, LyCORIS' ia3 and peft's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from single_layers import LAYERS, fill, inputs, layer, same_as_lycoris, site

from library.errors import UserError
from networks.create import create
from networks.ia3 import IA3, Form
from networks.settings import Asked


def made(form: str, *, on_input: bool) -> IA3:
    adapter = IA3(site(layer(form)), form=Form(on_input))
    fill(adapter)
    return adapter


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize("on_input", [False, True])
def test_the_effective_weight_is_the_formula(form: str, on_input: bool) -> None:
    adapter = made(form, on_input=on_input)
    weight = adapter.site.module.weight
    factors = 1 + 0.7 * adapter.weight.detach().double().flatten()
    exact = torch.einsum("oi...,i->oi..." if on_input else "oi...,o->oi...", weight.double(), factors)
    ours = adapter.effective_weight(weight, adapter.tensors(), 0.7)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-7)  # fp32 has 7 digits
    towards = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6))
    (ours * towards).sum().backward()
    each = (0.7 * weight * towards).transpose(0, int(on_input)).flatten(1).sum(1)
    torch.testing.assert_close(adapter.weight.grad.flatten(), each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("multiplier", [1.0, 0.6])
def test_it_is_lycoris_ia3(form: str, on_input: bool, multiplier: float) -> None:
    lycoris = pytest.importorskip("lycoris.modules.ia3")
    same_as_lycoris(lycoris.IA3Module, made(form, on_input=on_input), multiplier, train_on_input=on_input)


@pytest.mark.parametrize("on_input", [False, True])
def test_pefts_factors_are_1_more(on_input: bool) -> None:
    """On a layer without bias: peft scales that as well."""
    peft = pytest.importorskip("peft")
    module = torch.nn.Sequential(layer("linear without bias"))
    adapter = IA3(site(module[0]), form=Form(on_input))
    fill(adapter)
    x = inputs(module[0])
    expected = adapter(x)
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if on_input else [])
    theirs = peft.get_peft_model(module, config)
    (factors,) = (parameter for name, parameter in theirs.named_parameters() if "ia3_l" in name)
    factors.data.copy_(1 + adapter.weight.detach().view(factors.shape))
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-6)


def test_it_sits_on_keys_values_and_the_feed_forward(true_sizes: Any) -> None:
    network = create("ia3", true_sizes["sd15"], Asked())
    assert network.counts() == {"text_encoder": 12 * 3, "unet": 16 * 5}
    ends = {(adapter.site.path.rpartition("_blocks.")[2][2:], adapter.form.on_input) for adapter in network.adapters}
    attention = {(f"attn{place}.to_{one}", False) for place in (1, 2) for one in "kv"}
    assert attention | {("ff.net.2", True)} <= ends
    assert {end for end, on_input in ends if on_input} - {"ff.net.2"} == {
        end for end, _ in ends if end.endswith("mlp.fc2")
    }
    xl = create("ia3", true_sizes["sdxl"], Asked())
    assert xl.counts() == {"text_encoder_1": 36, "text_encoder_2": 96, "unet": 70 * 5}
    everywhere = create("ia3", true_sizes["sd15"], Asked(), {"enable_all_linear": True, "train_on_input": True})
    assert everywhere.counts() == {"text_encoder": 72, "unet": 192}
    assert all(adapter.form.on_input for adapter in everywhere.adapters)


def test_a_model_without_known_names_is_an_error(toy_targets: Any) -> None:
    with pytest.raises(UserError, match=r"networks.ia3: this model has no keys, values and feed-forward layers"):
        create("ia3", toy_targets, Asked())
