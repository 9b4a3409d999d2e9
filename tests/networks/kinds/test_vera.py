"""VeRA against its formula and peft, its matrices from a seed, and the files that come out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import BASE, Toy, difference, lora_from_file, outputs, randomize, sd_targets, unet_targets
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from networks.create import create, create_from_file
from networks.files import read
from networks.network import Network
from networks.settings import Asked, LearningRates
from networks.vera import LAMBDA_B, LAMBDA_D, PROJECTION, Projection, VeRA, _say_seed, shared

CPU = torch.device("cpu")


def network(targets: Any, dim: int = 3, **more: Any) -> Network:
    made = create("vera", targets, Asked(dim=dim, seed=1), {"conv_dim": 2, **more})
    made.attach()
    return made


def adapters_of(made: Network) -> list[VeRA]:
    return [adapter for adapter in made.adapters if isinstance(adapter, VeRA)]


def pixels() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def test_the_matrices_are_those_of_peft_for_the_same_seed_and_sizes() -> None:
    from peft import VeraConfig, get_peft_model

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(10, 6), nn.Linear(6, 14)

    theirs = get_peft_model(Model(), VeraConfig(r=5, target_modules=["first", "second"], projection_prng_key=7))
    a, b = shared(Projection(7, 5, 10, 14), CPU, torch.float32)
    assert torch.equal(a, theirs.base_model.vera_A["default"])
    assert torch.equal(b, theirs.base_model.vera_B["default"])
    assert not torch.equal(a, shared(Projection(8, 5, 10, 14), CPU, torch.float32)[0])


def test_outputs_and_gradients_are_those_of_peft() -> None:
    from peft import VeraConfig, get_peft_model

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attentions = nn.ModuleList([nn.Linear(10, 6), nn.Linear(6, 14)])

        def forward(self, x: Tensor) -> Tensor:
            return self.attentions[1](self.attentions[0](x).tanh())

    ours, base, x = Model().requires_grad_(False), Model(), torch.randn(7, 10)
    made = create("vera", [unet_targets(ours)], Asked(dim=5), {"projection_prng_key": 7, "d_initial": 0.3})
    made.attach()
    assert all((adapter.vera_lambda_d - 0.3).abs().max() < 1e-6 for adapter in adapters_of(made))
    randomize(made, 0.5)
    config = VeraConfig(r=5, target_modules=["attentions.0", "attentions.1"], projection_prng_key=7)
    theirs = get_peft_model(base, config)
    pairs = list(zip(adapters_of(made), base.attentions, strict=True))
    with torch.no_grad():
        for adapter, layer in pairs:
            layer.vera_lambda_d["default"].copy_(adapter.vera_lambda_d)
            layer.vera_lambda_b["default"].copy_(adapter.vera_lambda_b)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for adapter, layer in pairs:
        for own, other in (
            (adapter.vera_lambda_d, layer.vera_lambda_d["default"]),
            (adapter.vera_lambda_b, layer.vera_lambda_b["default"]),
        ):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(9, 7), nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(3, 7, 1)])
def test_weight_and_gradients_are_the_closed_form(layer: Any) -> None:
    """W + diag(b) B diag(d) A in float64, on convolutions over in * height * width."""
    layer = layer.double().requires_grad_(False)
    toy = nn.Sequential(nn.ModuleDict({"attentions": nn.ModuleList([layer])}))
    (adapter,) = adapters_of(create("vera", [unet_targets(toy)], Asked(dim=4, seed=1), {"conv_dim": 4}).double())
    randomize(adapter, 0.5)
    adapter.attach()
    x = torch.randn(5, 9).double() if layer.weight.ndim == 2 else torch.randn(2, 3, 5, 5).double()
    layer(x).square().sum().backward()
    a, b = (matrix.double() for matrix in shared(adapter.projection, CPU, torch.float32))
    d, scale = (v.detach().clone().requires_grad_() for v in (adapter.vera_lambda_d, adapter.vera_lambda_b))
    weight = layer.weight + (torch.diag(scale) @ b @ torch.diag(d) @ a).view_as(layer.weight)
    y = x @ weight.T + layer.bias if x.ndim == 2 else nn.functional.conv2d(x, weight, layer.bias, padding=layer.padding)
    y.square().sum().backward()
    torch.testing.assert_close(adapter.vera_lambda_d.grad, d.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adapter.vera_lambda_b.grad, scale.grad, rtol=1e-9, atol=1e-9)


def test_all_layers_share_two_matrices_that_no_state_holds(toy) -> None:
    made = network([unet_targets(toy)])
    assert len({adapter.projection for adapter in made.adapters}) == 1
    (first, *_) = adapters_of(made)
    # 4 channels x 3 x 3 is the widest layer, 8 outputs the tallest
    assert first.projection == Projection(0, 3, 36, 8)
    assert {name.partition(".")[2] for name in made.state_dict()} == {LAMBDA_D, LAMBDA_B, PROJECTION, "alpha"}
    parameters = [p for group in made.groups(LearningRates(None, 1e-3, None)) for p in group["params"]]
    assert {parameter.ndim for parameter in parameters} == {1}


def test_a_state_regenerates_the_matrices_bit_by_bit(toy, caplog: pytest.LogCaptureFixture) -> None:
    _say_seed.cache_clear()
    made = network([unet_targets(toy)], projection_prng_key=5)
    randomize(made)
    expected = toy(pixels())
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.detach()
    shared.cache_clear()
    other = network([unet_targets(toy)])  # with another seed: that of the state counts
    other.load_state_dict(state)
    assert torch.equal(toy(pixels()), expected)
    assert [line.getMessage() for line in caplog.records if "prng" in line.getMessage()] == [
        "projection_prng_key: that of the file, 5, is used, and not 0"
    ]


def test_a_file_is_plain_lora_of_its_rank(toy, tmp_path: Path) -> None:
    made = network([unet_targets(toy)])
    randomize(made, 0.5)
    expected = toy(pixels())
    made.detach()
    made.save(tmp_path / "x.safetensors", None, None)
    file = read(tmp_path / "x.safetensors")
    assert {layer.kind for layer in file.layers.values()} == {"lora"}
    plain = lora_from_file(file, targets=[unet_targets(toy)])
    plain.attach()
    plain.load(file)
    torch.testing.assert_close(toy(pixels()), expected, rtol=1e-5, atol=1e-6)


def test_its_own_form_is_small_and_goes_on_with_fewer_layers(toy, tmp_path: Path) -> None:
    """Also in half precision, which must not round the seed, and where the widest layer is not trained on."""
    path = tmp_path / "x.safetensors"
    made = network([unet_targets(toy)], keep_form=True, projection_prng_key=123456789)
    randomize(made, 0.5)
    made.save(path, torch.float16, None)
    made.detach()
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.int64}
    fewer = {name: tensor for name, tensor in tensors.items() if "downsamplers" not in name}
    assert len(fewer) < len(tensors)
    for content in (tensors, fewer):
        save_file(content, path)
        file = read(path)
        assert {layer.kind for layer in file.layers.values()} == {"vera"}
        other = create_from_file("vera", file, [unet_targets(toy)], Asked(), {"keep_form": True})
        other.load(file)
        for adapter in adapters_of(other):
            assert adapter.projection == Projection(123456789, 3, 36, 8)
            same = made.get_submodule(adapter.site.name)
            torch.testing.assert_close(adapter.delta(), same.delta(), rtol=1e-2, atol=1e-3)  # rounded to 11 bits


def test_diffusers_acts_as_training_did(tiny, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    unet, text_encoder = tiny
    made = create("vera", sd_targets(unet, text_encoder), Asked(dim=16, seed=1), {})
    made.attach()
    randomize(made, 0.3)
    expected = outputs(unet, text_encoder)
    made.save(tmp_path / "x.safetensors", None, None)
    pipeline = StableDiffusionPipeline.from_pretrained(
        BASE, dtype=torch.float32, safety_checker=None, feature_extractor=None
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    for actual, wanted in zip(outputs(pipeline.unet, pipeline.text_encoder), expected, strict=True):
        assert difference(actual, wanted) < 1e-5


@pytest.mark.parametrize(
    ("asked", "arguments", "name"),
    [
        (Asked(dim=4, alpha=3.0), {}, "network_alpha: 3.0"),
        (Asked(dim=4), {"rs_lora": True}, "rs_lora: True"),
        (Asked(dim=4), {"conv_dim": 2, "conv_alpha": 2.0}, "conv_alpha: 2.0"),
    ],
)
def test_an_alpha_is_refused(toy, asked: Asked, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError) as caught:
        create("vera", [unet_targets(toy)], asked, arguments)
    assert str(caught.value) == f"{name} has no effect: networks.vera has no alpha"


def test_a_seed_below_0_is_refused(toy) -> None:
    with pytest.raises(UserError, match="projection_prng_key: -1 is below 0"):
        create("vera", [unet_targets(toy)], Asked(dim=4), {"projection_prng_key": -1})


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0, 3, 36], "is not a seed and three sizes"),
        ([0, 3, -36, 8], "is not a seed and three sizes"),
        ([0, 3, 36, 7], "is too small for this layer"),
        ([0, 2**20, 2**40, 8], "stands for matrices of 1152921504606846976 numbers"),
    ],
)
def test_sizes_in_a_file_that_cannot_be_are_refused(toy, tmp_path: Path, numbers: list[int], message: str) -> None:
    made = network([unet_targets(toy)], keep_form=True)
    tensors = dict(made.tensors()) | {
        name: torch.tensor(numbers) for name in made.tensors() if name.endswith(PROJECTION)
    }
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        create_from_file("vera", read(tmp_path / "x.safetensors"), [unet_targets(Toy())], Asked(), {})
