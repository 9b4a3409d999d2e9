"""What every kind of adapter must do, over the registry: a new kind is tested here as soon as it has its line there.

A made-up second kind is tested as well, so that nothing here holds for LoRA alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import Toy, made_up_kind, randomize, unet_targets
from torch import nn

from library.quantization import FORMATS
from library.quantization.frozen import decoded
from networks.create import create as create_network
from networks.create import create_from_file
from networks.files import read
from networks.kinds import KINDS, load
from networks.merge import BaseWeights
from networks.network import Network
from networks.settings import Asked
from tests.frozen import held
from tests.merging import merge_into
from tests.quick import quick

# Sizes that differ between the layers, where a kind has any
SIZES: dict[str, tuple[Asked, dict[str, Any]]] = {
    "lora": (Asked(dim=3, alpha=1.5, seed=1), {"conv_dim": 2}),
    "dora": (Asked(dim=3, alpha=1.5, seed=1), {"conv_dim": 2}),
    "oft": (Asked(dim=2, alpha=0.05, seed=1), {"enable_all_linear": True, "enable_conv": True, "rescaled": True}),
    "boft": (Asked(dim=6, seed=1), {"conv_dim": 4, "rescaled": True, "constraint": 0.05}),
    "ia3": (Asked(seed=1), {"enable_all_linear": True, "enable_conv": True}),
    "full": (Asked(seed=1), {"enable_conv": True}),
    "norm": (Asked(seed=1), {"enable_conv": True}),
    "lokr": (Asked(dim=1, alpha=0.5, seed=1), {"conv_dim": 1}),
    "loha": (Asked(dim=3, alpha=1.5, seed=1), {"conv_dim": 1}),
    "lora_fa": (Asked(dim=3, alpha=1.5, seed=1), {"conv_dim": 2}),
    "dylora": (Asked(dim=4, alpha=1.5, seed=1), {"conv_dim": 4, "unit": 2}),
    "pissa": (Asked(dim=3, alpha=1.5, seed=1), {"conv_dim": 2, "keep_form": True}),
    "vera": (Asked(dim=3, seed=1), {"conv_dim": 2, "keep_form": True}),
    "adalora": (Asked(dim=3, alpha=1.5, seed=1), {"conv_dim": 2, "keep_form": True}),
    "glora": (Asked(dim=3, alpha=1.5, seed=1), {"conv_dim": 2}),
    "t_lora": (Asked(dim=3, alpha=1.5, seed=1), {"conv_dim": 2}),
}


@pytest.fixture(params=[*KINDS, "diagonal"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with nullcontext() if request.param in KINDS else made_up_kind():
        yield request.param


def create(kind: str, toy: Toy) -> Network:
    asked, arguments = SIZES.get(kind, (Asked(seed=1), {}))
    network = create_network(kind, [unet_targets(toy)], asked, arguments)
    network.attach()
    return network.eval()  # in training some kinds draw at random


def pixels() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def test_a_new_adapter_changes_nothing(kind, toy):
    expected = toy(pixels())
    create(kind, toy)
    assert torch.equal(toy(pixels()), expected)


def test_every_parameter_that_is_trained_gets_a_gradient(kind, toy):
    network = create(kind, toy)
    randomize(network)
    toy(pixels()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in toy.parameters())


def test_module_dropout_leaves_adapters_out_in_training_alone(kind, toy):
    asked, arguments = SIZES.get(kind, (Asked(seed=1), {}))
    network = create_network(kind, [unet_targets(toy)], asked, {**arguments, "module_dropout": 0.9})
    network.attach()
    randomize(network)
    with network.off():
        base = toy(pixels())
    seen = {}
    for training in (True, False):
        network.train(training)
        torch.manual_seed(0)
        seen[training] = [torch.equal(toy(pixels()), base) for _ in range(40)]
    assert set(seen[True]) == {True, False}
    assert not any(seen[False])


def test_the_bases_weights_are_not_part_of_the_network(kind, toy):
    network = create(kind, toy)
    ours = {id(parameter) for parameter in network.parameters()}
    assert not ours & {id(parameter) for parameter in toy.parameters()}
    assert set(toy.state_dict()) == set(Toy().state_dict())


def test_merging_gives_the_same_output(kind, toy):
    network = create(kind, toy)
    randomize(network, 0.5)
    network.set_multiplier(0.7)
    with_adapter, base = toy(pixels()), None
    network.detach()
    base = toy(pixels())
    network.merge()
    assert not torch.allclose(base, with_adapter, atol=1e-2)
    torch.testing.assert_close(toy(pixels()), with_adapter, rtol=1e-5, atol=1e-6)


def test_an_outline_of_the_base_gives_the_same_changes(kind, toy, tmp_path: Path):
    """As weights are merged while they are read."""
    network = create(kind, toy)
    randomize(network, 0.5)
    file = tmp_path / "adapter.safetensors"
    network.save(file, None, None)
    network.detach()
    outline, weights = Toy().to("meta"), dict(toy.named_parameters())
    paths = {layer: path for path, layer in outline.named_modules()}
    twice = BaseWeights([str(file), str(file)], [0.7, 0.4])
    with torch.no_grad():
        found = {
            f"{paths[layer]}.{leaf}": change(weights[f"{paths[layer]}.{leaf}"])
            for (layer, leaf), change in twice.changes([unet_targets(outline)]).items()
        }
    before = {name: weight.clone() for name, weight in weights.items()}
    merge_into(twice, [unet_targets(toy)])
    assert any(not torch.equal(weight, before[name]) for name, weight in weights.items())
    for name, weight in weights.items():
        assert torch.equal(found.get(name, before[name]), weight), name


@pytest.mark.parametrize("format", quick(FORMATS, "nf4"))
def test_a_packed_base_is_the_base_rounded_before(kind, toy, format):
    """In outputs, gradients, and in first values that come from the base."""
    rounded, targets = copy.deepcopy(toy), unet_targets(toy)
    for path, layer in toy.named_modules():
        wanted = targets.linear.fullmatch(path) or targets.conv.fullmatch(path)
        if wanted and isinstance(layer, nn.Linear | nn.Conv2d):
            rounded.get_submodule(path).weight.data = decoded(held(layer, format).weight, torch.float32)
    found = []
    for one in (toy, rounded):
        network = create(kind, one)
        first = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        randomize(network)
        network.before_batch()
        answer = one(pixels())
        answer.square().sum().backward()
        gradients = {f"gradient of {name}": parameter.grad for name, parameter in network.named_parameters()}
        found.append({"answer": answer, "norms": network.norms(), **gradients, **first})
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)  # fp32, summed in another order


def test_saving_and_loading_gives_the_same_output_bit_by_bit(kind, toy, tmp_path: Path):
    network = create(kind, toy)
    randomize(network)
    expected = toy(pixels())
    file = str(tmp_path / "adapter.safetensors")
    network.save(file, None, {"ss_output_name": "adapter"})
    network.detach()

    other = create(kind, toy)
    report = other.load(read(file))
    assert list(report.matched) == sorted(network.layers())
    assert not report.missing
    assert not report.unexpected
    assert not report.mismatched
    assert torch.equal(toy(pixels()), expected)


def test_dimensions_are_taken_from_a_file(kind, toy, tmp_path: Path):
    network = create(kind, toy)
    randomize(network)
    expected = toy(pixels())
    file = str(tmp_path / "adapter.safetensors")
    network.save(file, None, None)
    network.detach()

    content = read(file)
    other = create_from_file(kind, content, [unet_targets(toy)], Asked()).eval()
    other.attach()
    other.load(content)
    assert content.tensors.keys() == network.tensors().keys() <= network.state_dict().keys()
    assert {layer.kind for layer in content.layers.values()} <= set(load(kind).reads())
    assert torch.equal(toy(pixels()), expected)


def test_switching_off_gives_exactly_the_base_and_on_again_the_adapter(kind, toy):
    base = toy(pixels())
    network = create(kind, toy)
    randomize(network)
    expected = toy(pixels())
    with network.off():
        assert torch.equal(toy(pixels()), base)
    assert torch.equal(toy(pixels()), expected)
    assert not torch.equal(expected, base)


def test_another_strength_lasts_as_long_as_its_context(kind, toy):
    """A strength that is not 0 or 1 is another output; contexts may be nested."""
    base = toy(pixels())
    network = create(kind, toy)
    randomize(network)
    expected = toy(pixels())
    with network.at(-1.0):
        other = toy(pixels())
        assert not any(torch.equal(other, one) for one in (base, expected))
        with network.at(1.0):
            assert torch.equal(toy(pixels()), expected)
        assert torch.equal(toy(pixels()), other)
    assert torch.equal(toy(pixels()), expected)


def test_removing_gives_the_layers_their_own_forward_back(kind, toy):
    network = create(kind, toy)
    network.detach()
    assert not any("forward" in vars(layer) for layer in toy.modules())


def test_two_networks_can_sit_on_one_model(kind, toy):
    first, second = create(kind, toy), create(kind, toy)
    randomize(first)
    alone_first = toy(pixels())
    randomize(second)
    both = toy(pixels())
    second.detach()
    assert torch.equal(toy(pixels()), alone_first)
    assert not torch.equal(both, alone_first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_runs_without_autocast(kind, toy, dtype):
    toy.to(dtype)
    network = create(kind, toy)
    randomize(network)
    output = toy(pixels().to(dtype))
    output.float().sum().backward()
    assert output.dtype == dtype
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in network.parameters())


def test_autocast_computes_in_its_own_dtype(kind, toy):
    network = create(kind, toy)
    randomize(network)
    exact = toy(pixels())
    with torch.autocast("cpu", torch.bfloat16):
        output = toy(pixels())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.02)


def test_the_norm_is_that_of_the_weights_difference(kind, toy):
    network = create(kind, toy)
    randomize(network, 0.5)
    for adapter in network.adapters:
        torch.testing.assert_close(adapter.norm(), adapter.delta().norm(), rtol=1e-5, atol=1e-7)
    adapters = list(network.adapters)
    alone = torch.stack([adapter.norm() for adapter in adapters])
    assert torch.equal(network.norms(), alone)


def test_max_norm_shrinks_those_above_it_and_leaves_the_others(kind, toy):
    network = create(kind, toy)
    if reason := network.refuses("scale_weight_norms"):
        assert reason.startswith(f"--scale_weight_norms: networks.{kind}")
        return
    randomize(network, 0.5)
    before = {adapter.site.name: adapter.delta() for adapter in network.adapters}
    norms = {name: delta.norm().item() for name, delta in before.items()}
    limit = sorted(norms.values())[-2] * 0.99  # below the two largest
    scaled, mean, largest = network.limit_norms(limit)
    assert scaled == 2
    for adapter in network.adapters:
        name = adapter.site.name
        expected = before[name] * min(1, limit / norms[name])
        torch.testing.assert_close(adapter.delta(), expected, rtol=1e-5, atol=1e-7)
    assert largest == pytest.approx(limit)
    assert mean == pytest.approx(sum(min(limit, norm) for norm in norms.values()) / len(norms))


def test_the_functions_of_tensors_agree_with_the_adapter(kind, toy):
    """Tools have a file's tensors and no model."""
    network = create(kind, toy)
    randomize(network, 0.5)
    for adapter in network.adapters:
        layer, own = adapter.site.module, dict(adapter.state_dict())
        assert {name for name, _ in adapter.named_parameters()} <= set(load(kind).NAMES)
        assert load(kind).lacking(own) is None
        delta = load(kind).effective_weight(layer.weight, own, 1.0) - layer.weight.float()
        assert delta.dtype == torch.float32
        torch.testing.assert_close(delta, adapter.delta())
        if kind != "boft":  # whose stages each take the strength
            effective = load(kind).effective_weight(layer.weight, own, 0.5)
            torch.testing.assert_close(effective, layer.weight + 0.5 * delta)


def test_the_layers_own_operation_with_the_effective_weight_is_what_the_adapter_does(kind, toy):
    """`forward`, which may be faster, against the formula."""
    network = create(kind, toy)
    randomize(network, 0.5)
    network.set_multiplier(0.7)
    for adapter in network.adapters:
        layer, tensors = adapter.site.module, adapter.tensors()
        channels = layer.weight.shape[1 if layer.weight.ndim > 1 else 0]
        x = torch.randn(2, channels, *([5, 5] if isinstance(layer, torch.nn.Conv2d | torch.nn.GroupNorm) else []))
        actual = layer(x)
        changed = {"weight": adapter.effective_weight(layer.weight, tensors, 0.7)}
        if layer.bias is not None:
            changed["bias"] = adapter.effective_bias(layer.bias, tensors, 0.7)
        adapter.detach()
        torch.testing.assert_close(actual, torch.func.functional_call(layer, changed, x), rtol=1e-4, atol=1e-5)


def test_what_is_frozen_at_zero_is_in_states_and_not_in_files(kind, toy):
    network = create(kind, toy)
    names = network.tensors().keys()
    assert names <= network.state_dict().keys()
    network.requires_grad_(False)
    assert network.tensors() == {}
    randomize(network)
    assert network.tensors().keys() == names
