"""PiSSA: the start, the published formula, and files against the untouched base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import BASE, Toy, difference, lora_from_file, outputs, randomize, sd_targets, unet_targets
from safetensors.torch import load_file
from torch import Tensor, nn

from library.errors import UserError
from networks.create import create, create_from_file
from networks.files import read
from networks.network import Network
from networks.pissa import PiSSA, principal
from networks.settings import Asked
from networks.sites import Site


def network(targets: Any, **more: Any) -> Network:
    made = create("pissa", targets, Asked(dim=3, alpha=1.5, seed=1), {"conv_dim": 2, **more})
    made.attach()
    return made


def pixels() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def train(made: Network, toy: nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.02)
    for step in range(steps):
        (toy(pixels()) - step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def layer_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Linear(9, 7)
        if kind == "linear"
        else nn.Conv2d(3, 7, 3 if kind == "conv" else 1, padding=int(kind == "conv"))
    )


@pytest.mark.parametrize("kind", ["linear", "conv", "1x1"])
def test_it_starts_from_the_largest_directions_of_the_weight(kind: str) -> None:
    layer = layer_of(kind)
    made = PiSSA(Site("x", "unet", "unet", layer), rank=3, alpha=1.2, seed=1)
    u, s, v = torch.linalg.svd(layer.weight.detach().double().flatten(1), full_matrices=False)
    best = u[:, :3] * s[:3] @ v[:3]
    start = 0.4 * made.pissa_up.weight.flatten(1) @ made.pissa_down.weight.flatten(1)
    torch.testing.assert_close(start.double(), best, rtol=1e-4, atol=1e-5)
    # √S is shared out evenly
    torch.testing.assert_close(
        made.pissa_up.weight.flatten(1).norm(dim=0), made.pissa_down.weight.flatten(1).norm(dim=1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_adapter_changes_no_bit_whatever_the_precision(toy, dtype) -> None:
    toy.to(dtype)
    x = pixels().to(dtype)
    expected = toy(x)
    network([unet_targets(toy)])
    assert torch.equal(toy(x), expected)


def test_nor_does_it_under_autocast(toy) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = toy(pixels())
        network([unet_targets(toy)])
        assert torch.equal(toy(pixels()), expected)


@pytest.mark.parametrize("kind", ["linear", "conv", "1x1"])
def test_weight_and_gradients_are_those_of_the_paper(kind: str) -> None:
    """W_res + s B A with W_res = W - s B0 A0, in float64."""
    layer = layer_of(kind).double().requires_grad_(False)
    made = PiSSA(Site("x", "unet", "unet", layer), rank=2, alpha=1.0, seed=1).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    made.attach()
    x = torch.randn(4, 9).double() if kind == "linear" else torch.randn(2, 3, 5, 5).double()
    layer(x).square().sum().backward()

    down, up = (w.detach().clone().requires_grad_() for w in (made.lora_down.weight, made.lora_up.weight))
    residual = layer.weight.flatten(1) - 0.5 * made.pissa_up.weight.flatten(1) @ made.pissa_down.weight.flatten(1)
    weight = (residual + 0.5 * up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
    y = (
        x @ weight.T + layer.bias
        if kind == "linear"
        else nn.functional.conv2d(x, weight, layer.bias, padding=layer.padding)
    )
    y.square().sum().backward()
    torch.testing.assert_close(made.lora_down.weight.grad, down.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made.lora_up.weight.grad, up.grad, rtol=1e-9, atol=1e-9)


def test_a_step_trains_what_pefts_trains() -> None:
    """The same start and gradient give the same weight after a step of SGD as peft's PiSSA, whose base is changed."""
    from peft import LoraConfig, inject_adapter_in_model

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(9, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    ours, theirs, x = Model().requires_grad_(False), Model(), torch.randn(5, 9)
    made = PiSSA(Site("x", "unet", "unet", ours.layer), rank=3, alpha=6.0, seed=1)
    made.attach()
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], init_lora_weights="pissa"), theirs)
    # their pair is ours up to signs: √(S/s) shared out in the same way
    pair = [theirs.layer.lora_A["default"].weight, theirs.layer.lora_B["default"].weight]
    torch.testing.assert_close(
        2 * pair[1] @ pair[0], 2 * made.lora_up.weight @ made.lora_down.weight, rtol=1e-4, atol=1e-5
    )
    for parameters, model in ((made.parameters(), ours), (pair, theirs)):
        optimizer = torch.optim.SGD(list(parameters), lr=0.05)
        model(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)  # their base has been rounded once more


def test_a_file_is_plain_lora_of_twice_the_rank_for_the_untouched_base(toy, tmp_path: Path) -> None:
    made = network([unet_targets(toy)])
    train(made, toy)
    expected = toy(pixels())
    for dtype, bound in ((None, 1e-6), (torch.float16, 2e-3)):
        made.save(tmp_path / "x.safetensors", dtype, None)
        file = read(tmp_path / "x.safetensors")
        assert {layer.kind for layer in file.layers.values()} == {"lora"}
        for layer in file.layers.values():
            rank = layer.tensors["lora_down.weight"].shape[0]
            assert rank in (4, 6)
            assert layer.tensors["alpha"].item() / rank == {6: 0.5, 4: 0.5}[rank]
        other = Toy()
        other.load_state_dict(toy.state_dict())
        plain = lora_from_file(file, targets=[unet_targets(other)])
        plain.attach()
        plain.load(file)
        assert difference(other(pixels()), expected) < bound


def test_half_precision_rounds_the_difference_and_not_the_two_large_products(toy) -> None:
    """[A; A0] and [B, -B0] in fp16 would lose what was trained: their products are W's size."""
    made = network([unet_targets(toy)])
    train(made, toy, 2)
    for adapter in made.adapters:
        ours, weight = adapter.delta(), adapter.site.module.weight.shape
        pair = {name: tensor.half().float() for name, tensor in adapter.export().items()}
        usual = adapter.scale * sum(
            sign * (up.half().float().flatten(1) @ down.half().float().flatten(1)).view(weight)
            for sign, up, down in (
                (1, adapter.lora_up.weight, adapter.lora_down.weight),
                (-1, adapter.pissa_up.weight, adapter.pissa_down.weight),
            )
        )
        plain = adapter.scale * (pair["lora_up.weight"].flatten(1) @ pair["lora_down.weight"].flatten(1)).view(weight)
        assert (plain - ours).norm() < 1e-3 * ours.norm()
        assert (plain - ours).norm() < (usual - ours).norm()


def test_its_own_form_goes_on_where_it_was(toy, tmp_path: Path) -> None:
    made = network([unet_targets(toy)], keep_form=True)
    train(made, toy)
    expected = toy(pixels())
    made.save(tmp_path / "x.safetensors", None, None)
    made.detach()
    file = read(tmp_path / "x.safetensors")
    assert {layer.kind for layer in file.layers.values()} == {"pissa"}
    sizes = create_from_file("pissa", file, [unet_targets(toy)], Asked(), {"keep_form": True})
    sizes.attach()
    sizes.load(file)
    assert torch.equal(toy(pixels()), expected)
    assert all(
        torch.equal(sizes.tensors()[name], tensor) for name, tensor in load_file(tmp_path / "x.safetensors").items()
    )
    sizes.detach()
    again = network([unet_targets(toy)])
    again.load(file)
    assert torch.equal(toy(pixels()), expected)


def test_the_start_depends_on_seed_and_layer_alone(tiny) -> None:
    """In layers whose directions are drawn at random as well; torch's stream stays where it was."""
    layer = nn.Linear(300, 400)
    torch.manual_seed(1)
    first = PiSSA(Site("x", "unet", "unet", layer), rank=4, alpha=1.0, seed=1)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = PiSSA(Site("x", "unet", "unet", layer), rank=4, alpha=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("power", [-0.5, -0.1, 0.0])
def test_large_matrices_lose_less_than_a_hundredth(power: float) -> None:
    """Of the squared norm that the best r directions hold: for steep, flat and equal singular values."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 300, generator=generator)).Q for n in (300, 400))
    matrix = u * torch.arange(1, 301).float() ** power @ v.T
    best = torch.linalg.svdvals(matrix)[:8].square().sum()
    left, values, right = principal(matrix, 8, 1)
    assert (left.T @ matrix).square().sum() > 0.99 * best
    torch.testing.assert_close(left.T @ left, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(right.T @ right, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(left.T @ matrix @ right, torch.diag(values), atol=1e-4, rtol=0)


def test_a_base_in_float8_starts_from_its_rounded_weight(toy) -> None:
    layer = nn.Linear(16, 12)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    made = PiSSA(Site("x", "unet", "unet", layer), rank=2, alpha=2.0, seed=1)
    rounded = layer.weight.float()
    u, s, v = torch.linalg.svd(rounded, full_matrices=False)
    torch.testing.assert_close(
        made.lora_up.weight @ made.lora_down.weight, u[:, :2] * s[:2] @ v[:2], rtol=1e-4, atol=1e-5
    )


def test_diffusers_acts_as_training_did(tiny, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    unet, text_encoder = tiny
    made = network(sd_targets(unet, text_encoder))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    expected = outputs(unet, text_encoder)
    made.save(tmp_path / "x.safetensors", None, None)
    pipeline = StableDiffusionPipeline.from_pretrained(
        BASE, dtype=torch.float32, safety_checker=None, feature_extractor=None
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    for actual, wanted in zip(outputs(pipeline.unet, pipeline.text_encoder), expected, strict=True):
        assert difference(actual, wanted) < 1e-5


def test_a_rank_above_the_layers_is_refused(toy) -> None:
    with pytest.raises(UserError, match="lora_unet_attentions_0_to_q: a rank of 7 is above the 6 singular values"):
        create("pissa", [unet_targets(toy)], Asked(dim=7))


def test_a_lora_that_stays_at_its_start_is_not_in_the_file(toy) -> None:
    made = network([unet_targets(toy)]).requires_grad_(False)
    assert made.tensors() == {}
    randomize(made)
    assert made.tensors()
