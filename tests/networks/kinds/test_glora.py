"""GLoRA against its formula in float64, and against LyCORIS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from product_models import (
    LAYERS,
    check_formula,
    layer_and_input,
    of_lycoris_file,
    on_layer,
    on_layer_from,
    randomize,
)
from torch import Tensor, nn

from networks.glora import GLoRA, in_new_form
from networks.network import Network
from networks.settings import LearningRates

FORMS: dict[str, dict[str, Any]] = {"rank 3": {"dim": 3}, "alpha 8": {"dim": 2, "alpha": 8.0}}


def closed_form(adapter: GLoRA, weight: Tensor) -> Tensor:
    """Each place of the kernel by itself, in the dtype of the tensors."""
    own = {name: parameter.flatten(1) for name, parameter in adapter.named_parameters()}
    mixing = own["a1.weight"] @ own["a2.weight"]
    places = weight.view(*weight.shape[:2], -1).unbind(2)
    moved = torch.stack([place @ mixing for place in places], 2).view(weight.shape)
    added = (own["b1.weight"] @ own["b2.weight"]).view(weight.shape)
    return weight + adapter.alpha.item() / adapter.rank * (moved + added)


def old_form(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"a1.weight": "a2.weight", "a2.weight": "a1.weight", "b1.weight": "b2.weight", "b2.weight": "b1.weight"}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer_name", LAYERS)
def test_forward_and_gradients_are_those_of_the_formula(layer_name, form):
    check_formula("glora", layer_name, FORMS[form], closed_form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer_name", LAYERS)
def test_names_shapes_and_outputs_are_those_of_lycoris(layer_name, form):
    """Each LyCORIS module's own tensors, loaded as a file's, in the new form and in the old one. Both compute in fp32,
    in another order of operations."""
    layer, x, expected, tensors = of_lycoris_file("glora", layer_name, FORMS[form])
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for own in (tensors, old_form(tensors)):
        adapter = on_layer_from("glora", layer, own)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert {name: tuple(tensor.shape) for name, tensor in adapter.export().items()} == shapes
        effective = GLoRA.effective_weight(layer.weight, own, 0.5)
        torch.testing.assert_close(effective, layer.weight + 0.5 * adapter.delta())
        adapter.detach()


@pytest.mark.parametrize("shape", [(24, 40), (36, 36), (40, 24), (24, 40, 3, 3)])
@pytest.mark.parametrize("rank", [1, 3, 24, 36, 50])
def test_forms_are_told_apart_from_the_weights_shape(shape, rank):
    """ComfyUI's rule; only at the rank of a square weight's own size both are possible, and the old one counts."""
    out, inputs, *kernel = shape
    ones = [1] * len(kernel)
    new = {
        "a1.weight": torch.zeros(inputs, rank, *ones),
        "a2.weight": torch.zeros(rank, inputs, *ones),
        "b1.weight": torch.zeros(out, rank, *ones),
        "b2.weight": torch.zeros(rank, inputs, *kernel),
    }
    both = rank == out == inputs
    assert all(in_new_form(old_form(new), shape)[name] is tensor for name, tensor in new.items())
    assert all(in_new_form(new, shape)[name] is tensor for name, tensor in new.items()) != both


def test_a_rank_of_a_square_weights_size_is_read_as_it_was_written():
    layer, x = layer_and_input("square")
    adapter = on_layer("glora", layer, dim=36)
    randomize(adapter)
    expected = layer(x)
    adapter.detach()
    on_layer_from("glora", layer, adapter.export())
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("layer_name", LAYERS)
def test_rescaling_scales_delta(layer_name):
    layer, x = layer_and_input(layer_name)
    adapter = on_layer("glora", layer)
    assert torch.equal(layer(x), adapter.base_forward(x))
    assert adapter.is_zero()
    randomize(adapter)
    delta = adapter.delta()
    adapter.requires_grad_(False).shrink(0.25)
    torch.testing.assert_close(adapter.delta(), delta * 0.25, rtol=1e-5, atol=1e-6)


def test_pairs_for_optimizers_and_lora_plus():
    layer, _ = layer_and_input("conv3x3")
    adapter = on_layer("glora", layer)
    adapter.detach()
    groups = Network([adapter], plus_ratios={"unet": 4.0}).groups(LearningRates(None, 1e-4, 1e-4))
    plus, usual = sorted(groups, key=lambda group: "lora_plus_ratio" not in group)
    assert [name.removeprefix("lora_unet_x.") for name in plus["param_names"]] == ["a1.weight", "b1.weight"]
    assert plus["roles"] == ["", "up"]
    assert plus["partners"][0] is None
    assert plus["partners"][1] is adapter.b2.weight
    assert usual["roles"] == ["", "down"]


@pytest.mark.parametrize("layer_name", LAYERS)
def test_dropout_keeps_the_mean_and_drops_whole_ranks(layer_name):
    """The mean of many draws is what there is without. The bound is five standard errors of the draws themselves."""
    layer, x = layer_and_input(layer_name)
    adapter = on_layer("glora", layer, settings={"rank_dropout": 0.4}, dropout=0.3)
    randomize(adapter)
    torch.manual_seed(0)
    expected = adapter.eval()(x)
    draws = torch.stack([adapter.train()(x) for _ in range(400)])
    error = (draws.mean(0) - expected).abs()
    assert (error <= 5 * draws.std(0) / 20 + 1e-5).all()
    adapter.detach()
    only_ranks = on_layer("glora", layer, settings={"rank_dropout": 0.999})
    randomize(only_ranks)
    assert torch.equal(only_ranks.train()(x), only_ranks.base_forward(x))


def test_the_bases_own_operation_sees_one_input():
    """No product with W is formed: the layer runs once."""
    layer = nn.Linear(8, 6).requires_grad_(False)
    adapter = on_layer("glora", layer)
    calls = []
    base = adapter.base_forward
    adapter.base_forward = lambda x: calls.append(x) or base(x)
    layer(torch.randn(2, 8))
    assert len(calls) == 1
