"""LoRA-FA: a frozen random `down`, and nothing kept of a layer's inputs for a gradient that nobody wants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_models import randomize, unet_targets
from torch import nn

from networks.create import create
from networks.lora import DOWN, UP
from networks.lora_fa import LoRAFA
from networks.network import Network
from networks.settings import Asked, LearningRates
from networks.sites import Site


def adapter_on(layer: nn.Module, rank: int = 4, **more: Any) -> LoRAFA:
    made = LoRAFA(Site("x", "unet", "unet", layer), rank=rank, alpha=2.0, **more)
    made.attach()
    return made


def network(toy: nn.Module) -> Network:
    return create("lora_fa", [unet_targets(toy)], Asked(dim=3, alpha=1.5, seed=1), {"conv_dim": 2})


def test_down_is_normal_with_the_published_variance() -> None:
    made = adapter_on(nn.Linear(600, 10), 200, seed=1)
    down = made.lora_down.weight
    # 120,000 draws: the sample variance is within 2 % of the true one at five standard deviations
    assert down.var().item() == pytest.approx(2 / (600 + 200), rel=0.02)
    assert abs(down.mean().item()) < 5 * (2 / 800 / down.numel()) ** 0.5
    assert not made.lora_up.weight.any()


def test_down_is_in_states_and_files_and_in_no_group(toy) -> None:
    made = network(toy)
    made.attach()
    trained = {name for group in made.groups(LearningRates(None, 1e-3, None)) for name in group["param_names"]}
    assert trained == {f"{name}.{UP}" for name in made.layers()}
    for table in (made.state_dict(), made.tensors()):
        assert {f"{name}.{end}" for name in made.layers() for end in (DOWN, UP, "alpha")} == set(table)
    assert made.parameter_counts() == {"unet": sum(parameter.numel() for parameter in made.parameters())}


def test_optimizer_steps_leave_down_alone(toy) -> None:
    made = network(toy)
    made.attach()
    before = {name: buffer.clone() for name, buffer in made.named_buffers()}
    optimizer = torch.optim.AdamW(made.groups(LearningRates(None, 1e-2, None)), weight_decay=0.1)
    for _ in range(3):
        toy(torch.randn(2, 4, 8, 8)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(buffer, before[name]) for name, buffer in made.named_buffers())
    assert all(parameter.any() for parameter in made.parameters())


def test_gradient_of_up_is_the_closed_form() -> None:
    layer = nn.Linear(6, 5).double().requires_grad_(False)
    made = adapter_on(layer).double()
    randomize(made)
    x = torch.randn(7, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    grad = 2 * (x @ (layer.weight + made.delta()).T + layer.bias)
    expected = 0.5 * grad.T @ (x @ made.lora_down.weight.T)  # alpha / r = 0.5
    torch.testing.assert_close(made.lora_up.weight.grad, expected, rtol=1e-6, atol=1e-9)  # delta is fp32


def test_a_linear_layer_keeps_r_values_of_each_token_for_the_backward_pass() -> None:
    layer = nn.Linear(64, 32).requires_grad_(False)
    made = adapter_on(layer)
    kept: list[torch.Tensor] = []
    x = torch.randn(10, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert [tuple(tensor.shape) for tensor in kept if tensor.shape[0] == 10] == [(10, made.rank)]


def test_max_norm_scales_up_alone(toy) -> None:
    made = network(toy)
    randomize(made, 0.5)
    (first, *_), before = made.adapters, {name: buffer.clone() for name, buffer in made.named_buffers()}
    norm = first.norm().item()
    with torch.no_grad():
        first.shrink(0.5)
    assert first.norm().item() == pytest.approx(norm / 2, rel=1e-5)
    assert all(torch.equal(buffer, before[name]) for name, buffer in made.named_buffers())
