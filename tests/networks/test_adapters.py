"""What every adapter must do. A new one is a row in ADAPTERS."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from adapter_models import Toy, randomize, unet_targets

from networks.network import AdapterNetwork
from networks.protocol import without

ADAPTERS = ["networks.lora"]


@pytest.fixture(params=ADAPTERS)
def module(request):
    return importlib.import_module(request.param)


def create(module, toy: Toy, *, seed: int = 1, **options) -> AdapterNetwork:
    network = module.create_network(
        1.0, 3, 1.5, None, None, None, targets=[unet_targets(toy)], seed=seed, conv_dim=2, **options
    )
    network.apply_to(None, None)
    return network


def pixels() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def test_a_new_adapter_changes_nothing(module, toy):
    expected = toy(pixels())
    create(module, toy)
    assert torch.equal(toy(pixels()), expected)


def test_every_parameter_that_is_trained_gets_a_gradient(module, toy):
    network = create(module, toy)
    randomize(network)
    toy(pixels()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in toy.parameters())


def test_the_bases_weights_are_not_part_of_the_network(module, toy):
    network = create(module, toy)
    ours = {id(parameter) for parameter in network.parameters()}
    assert not ours & {id(parameter) for parameter in toy.parameters()}
    assert set(toy.state_dict()) == set(Toy().state_dict())


def test_merging_gives_the_same_output(module, toy):
    network = create(module, toy)
    randomize(network, 0.3)
    network.set_multiplier(0.7)
    with_adapter, base = toy(pixels()), None
    network.remove()
    base = toy(pixels())
    network.merge_to()
    assert not torch.allclose(base, with_adapter, atol=1e-2)
    torch.testing.assert_close(toy(pixels()), with_adapter, rtol=1e-5, atol=1e-6)


def test_saving_and_loading_gives_the_same_output_bit_by_bit(module, toy, tmp_path: Path):
    network = create(module, toy)
    randomize(network)
    expected = toy(pixels())
    file = str(tmp_path / "adapter.safetensors")
    network.save_weights(file, None, {"ss_output_name": "adapter"})
    network.remove()

    other = create(module, toy, seed=2)
    report = other.load_weights(file)
    assert len(report.matched) == 4
    assert not report.missing
    assert not report.unexpected
    assert not report.mismatched
    assert torch.equal(toy(pixels()), expected)


def test_dimensions_are_taken_from_a_file(module, toy, tmp_path: Path):
    network = create(module, toy)
    randomize(network)
    expected = toy(pixels())
    file = str(tmp_path / "adapter.safetensors")
    network.save_weights(file, None, None)
    network.remove()

    other, tensors = module.create_network_from_weights(1.0, file, None, None, None, targets=[unet_targets(toy)])
    other.apply_to(None, None)
    other.load_weights(file)
    assert tensors.keys() == network.state_dict().keys()
    assert torch.equal(toy(pixels()), expected)


def test_switching_off_gives_exactly_the_base_and_on_again_the_adapter(module, toy):
    base = toy(pixels())
    network = create(module, toy)
    randomize(network)
    expected = toy(pixels())
    with without(network):
        assert torch.equal(toy(pixels()), base)
    assert torch.equal(toy(pixels()), expected)
    assert not torch.equal(expected, base)


def test_removing_gives_the_layers_their_own_forward_back(module, toy):
    network = create(module, toy)
    network.remove()
    assert not any("forward" in vars(layer) for layer in toy.modules())


def test_two_networks_can_sit_on_one_model(module, toy):
    first, second = create(module, toy, seed=1), create(module, toy, seed=2)
    randomize(first)
    alone_first = toy(pixels())
    randomize(second)
    both = toy(pixels())
    second.remove()
    assert torch.equal(toy(pixels()), alone_first)
    assert not torch.equal(both, alone_first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_runs_without_autocast(module, toy, dtype):
    toy.to(dtype)
    network = create(module, toy)
    randomize(network)
    output = toy(pixels().to(dtype))
    output.float().sum().backward()
    assert output.dtype == dtype
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in network.parameters())


def test_autocast_computes_in_its_own_dtype(module, toy):
    network = create(module, toy)
    randomize(network)
    exact = toy(pixels())
    with torch.autocast("cpu", torch.bfloat16):
        output = toy(pixels())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.02)


def test_the_norm_is_that_of_the_weights_difference(module, toy):
    network = create(module, toy)
    randomize(network, 0.5)
    for adapter in network.adapters:
        torch.testing.assert_close(adapter.weight_norm(), adapter.delta_weight().norm(), rtol=1e-5, atol=1e-7)
    adapters = list(network.adapters)
    alone = torch.stack([adapter.weight_norm() for adapter in adapters])
    assert torch.equal(network.weight_norms(), alone)


def test_max_norm_shrinks_those_above_it_and_leaves_the_others(module, toy):
    network = create(module, toy)
    randomize(network, 0.5)
    before = {adapter.site.name: adapter.delta_weight() for adapter in network.adapters}
    norms = {name: delta.norm().item() for name, delta in before.items()}
    limit = sorted(norms.values())[1] * 1.01  # between the second and the third
    scaled, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    assert scaled == len(norms) - 2
    for adapter in network.adapters:
        name = adapter.site.name
        expected = before[name] * min(1, limit / norms[name])
        torch.testing.assert_close(adapter.delta_weight(), expected, rtol=1e-5, atol=1e-7)
    assert largest == pytest.approx(limit)
    assert mean == pytest.approx(sum(min(limit, norm) for norm in norms.values()) / len(norms))
