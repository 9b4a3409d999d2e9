"""AdaLoRA against the paper's formulas and against peft's RankAllocator, and the files that come out of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import BASE, Toy, difference, lora_from_file, outputs, randomize, sd_targets, unet_targets
from safetensors.torch import load_file
from torch import Tensor, nn

from library.errors import UserError
from networks.adalora import AdaLoRA, Settings, budget_at, scores
from networks.create import create, create_from_file
from networks.files import read
from networks.network import Network
from networks.settings import Asked

TOTAL = 40


def network(toy: nn.Module, **more: Any) -> Network:
    arguments = {"conv_dim": 2, "conv_alpha": 1.0, **more}
    made = create("adalora", [unet_targets(toy)], Asked(dim=4, alpha=2.0, seed=1), arguments)
    made.attach()
    return made


def adapters_of(made: Network) -> list[AdaLoRA]:
    return [adapter for adapter in made.adapters if isinstance(adapter, AdaLoRA)]


def pixels(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def train(made: Network, toy: nn.Module, steps: range, optimizer: torch.optim.Optimizer) -> None:
    for step in steps:
        loss = toy(pixels(step)).square().sum()
        penalty = made.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        made.after_step(step, TOTAL)
        optimizer.zero_grad(set_to_none=True)


def test_a_layer_begins_with_half_as_many_ranks_more_and_the_scale_of_its_target(toy) -> None:
    for adapter in network(toy).adapters:
        assert (adapter.rank, adapter.scale) == (3 if adapter.site.spatial else 6, 0.5)
    assert {adapter.rank for adapter in network(Toy(), init_r=12).adapters} == {12}


def test_weight_and_gradients_are_the_closed_form() -> None:
    """W + s P diag(E) Q in float64, for a convolution and a Linear layer."""
    for layer in (nn.Conv2d(3, 5, 3, padding=1), nn.Linear(6, 5)):
        layer = layer.double().requires_grad_(False)
        toy = nn.Sequential(nn.ModuleDict({"attentions": nn.ModuleList([layer])}))
        site_network = create("adalora", [unet_targets(toy)], Asked(dim=2, alpha=3.0, seed=1), {"conv_dim": 2})
        (adapter,) = adapters_of(site_network.double())
        randomize(site_network, 0.5)
        adapter.attach()
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64) if layer.weight.ndim == 4 else torch.randn(7, 6).double()
        layer(x).square().sum().backward()

        down, values, up = (
            tensor.detach().clone().requires_grad_()
            for tensor in (adapter.lora_down.weight, adapter.lora_E, adapter.lora_up.weight)
        )
        product = up.flatten(1) @ torch.diag(values.flatten()) @ down.flatten(1)
        weight = layer.weight + adapter.scale * product.view_as(layer.weight)
        y = nn.functional.conv2d(x, weight, layer.bias, padding=1) if x.ndim == 4 else x @ weight.T + layer.bias
        y.square().sum().backward()
        for ours, theirs in ((adapter.lora_down.weight, down), (adapter.lora_E, values), (adapter.lora_up.weight, up)):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
        delta = adapter.float().delta().double()
        torch.testing.assert_close(delta, weight - layer.weight, rtol=1e-5, atol=1e-6)  # formed in fp32


def test_the_penalty_is_zero_for_orthogonal_factors_and_the_published_norms_for_others(toy) -> None:
    made = network(toy)
    norms = []
    for adapter in adapters_of(made):
        for matrix in (adapter.lora_down.weight.flatten(1), adapter.lora_up.weight.flatten(1).T):
            norms.append((matrix.double() @ matrix.double().T - torch.eye(len(matrix))).norm())
    penalty = made.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.5 * (sum(norms) / len(norms)).item(), rel=1e-6)
    for adapter in adapters_of(made):
        with torch.no_grad():
            for weight in (adapter.lora_down.weight, adapter.lora_up.weight):
                nn.init.orthogonal_(weight.flatten(1))
    assert made.penalty().item() < 1e-5
    assert network(Toy(), orth_reg_weight=0.0).penalty() is None


def test_the_budget_is_the_papers_schedule() -> None:
    settings = Settings(tinit=0.1, tfinal=0.4, deltaT=5)
    found = [budget_at(step, 100, (120, 80), settings) for step in range(1, 101)]
    assert found[:10] == [(None, False)] * 10
    for step in range(11, 60):
        expected = int((120 - 80) * (1 - (step - 10) / 50) ** 3 + 80) if step % 5 == 0 else None
        assert found[step - 1] == (expected, False)
    assert found[59:] == [(80, True)] * 41
    assert [budget_at(1, 1, (3, 2), Settings())] == [(2, True)]  # one step: the last allocation is made in it


# -- against peft


class Plain(nn.Module):
    """Two Linear layers under one path, which peft and we can adapt."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attentions = nn.ModuleList([nn.Linear(10, 12), nn.Linear(12, 8)])
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.attentions[1](self.attentions[0](x).tanh())


def test_sensitivity_budget_and_masks_are_those_of_peft_step_by_step() -> None:
    """The same tensors, gradients and optimizer; scores are sums of products in another order: 1e-4 in fp32."""
    from peft import AdaLoraConfig, get_peft_model

    ours, base = Plain(), Plain()
    made = create(
        "adalora",
        [unet_targets(ours)],
        Asked(dim=4, alpha=4.0, seed=1),
        {"init_r": 6, "tinit": 0.1, "tfinal": 0.25, "deltaT": 2},
    )
    made.attach()
    config = AdaLoraConfig(
        init_r=6,
        target_r=4,
        tinit=4,
        tfinal=10,
        deltaT=2,
        total_step=TOTAL,
        lora_alpha=6,
        target_modules=["attentions.0", "attentions.1"],
    )
    theirs = get_peft_model(base, config)
    pairs = list(zip(adapters_of(made), (layer for layer in base.attentions), strict=True))
    with torch.no_grad():
        for adapter, layer in pairs:
            layer.lora_A["default"].copy_(adapter.lora_down.weight)
            layer.lora_B["default"].copy_(adapter.lora_up.weight)
            layer.lora_E["default"].copy_(adapter.lora_E)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizers = [torch.optim.SGD(made.parameters(), lr=0.3), torch.optim.SGD(trained, lr=0.3)]

    for step in range(1, TOTAL + 1):
        x = torch.randn(16, 10, generator=torch.Generator().manual_seed(step))
        (ours(x).square().sum(1).mean() + made.penalty()).backward()
        optimizers[0].step()
        made.after_step(step, TOTAL)
        optimizers[0].zero_grad()

        loss = base(x).square().sum(1).mean()
        norms = [
            (matrix @ matrix.T - torch.eye(len(matrix))).norm()
            for _, layer in pairs
            for matrix in (layer.lora_A["default"], layer.lora_B["default"].T)
        ]
        (loss + 0.5 * sum(norms) / len(norms)).backward()
        optimizers[1].step()
        if step < TOTAL - 10:  # peft then cuts its tensors; ours keep their shapes in states
            theirs.base_model.update_and_allocate(step)
            allocator = theirs.base_model.rankallocator
            for place, (adapter, layer) in enumerate(pairs):
                for average, table in (("sensitivity", allocator.exp_avg_ipt), ("uncertainty", allocator.exp_avg_unc)):
                    found = dict(adapter.get_submodule(average).named_buffers())
                    for part, letter in (("lora_down_weight", "A"), ("lora_E", "E"), ("lora_up_weight", "B")):
                        (key,) = (key for key in table if key.endswith(f"attentions.{place}.lora_{letter}.default"))
                        torch.testing.assert_close(found[part], table[key], rtol=1e-3, atol=1e-8)
                assert torch.equal(adapter.lora_E == 0, layer.lora_E["default"] == 0), step
                torch.testing.assert_close(adapter.lora_E, layer.lora_E["default"], rtol=1e-3, atol=1e-6)
        elif step == TOTAL - 10:
            theirs.base_model.update_and_allocate(step)
            pattern = theirs.peft_config["default"].rank_pattern
            kept = [list(map(bool, adapter.lora_mask.flatten().tolist())) for adapter, _ in pairs]
            assert kept == list(pattern.values())
            assert sum(map(sum, kept)) == 8
            break
        optimizers[1].zero_grad()


# -- a run


def test_the_ranks_that_are_left_are_the_best_over_all_layers_and_stay(toy) -> None:
    made = network(toy)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.03)
    train(made, toy, range(1, 8), optimizer)
    counts = [sum(int((a.lora_E != 0).sum()) for a in adapters_of(made))]
    assert all(adapter.lora_mask.all() for adapter in adapters_of(made))
    train(made, toy, range(8, 25), optimizer)  # the last allocation: 60 % of 40 steps
    every = torch.cat([scores(adapter) for adapter in adapters_of(made)])
    left = torch.cat([adapter.lora_mask.flatten() for adapter in adapters_of(made)])
    target = sum(adapter.form.target for adapter in adapters_of(made))
    assert left.sum() == target < counts[0] <= len(left)
    assert every[left == 1].min() >= every[left == 0].max()
    train(made, toy, range(25, TOTAL + 1), optimizer)
    assert torch.equal(torch.cat([adapter.lora_mask.flatten() for adapter in adapters_of(made)]), left)
    assert torch.equal(torch.cat([(adapter.lora_E != 0).flatten() for adapter in adapters_of(made)]), left == 1)


@pytest.mark.parametrize("stop", [10, 24, 30])
def test_a_run_goes_on_bit_by_bit(stop: int) -> None:
    def begun() -> tuple[Toy, Network, torch.optim.Optimizer]:
        torch.manual_seed(0)
        toy = Toy()
        made = network(toy)
        return toy, made, torch.optim.AdamW(made.parameters(), lr=0.03)

    toy, whole, optimizer = begun()
    train(whole, toy, range(1, stop + 1), optimizer)
    states = {name: tensor.clone() for name, tensor in whole.state_dict().items()}, optimizer.state_dict()
    other, resumed, its_optimizer = begun()
    resumed.load_state_dict(states[0])
    its_optimizer.load_state_dict(copy.deepcopy(states[1]))
    train(whole, toy, range(stop + 1, TOTAL + 1), optimizer)
    train(resumed, other, range(stop + 1, TOTAL + 1), its_optimizer)
    assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def test_a_run_that_goes_back_allocates_again(toy) -> None:
    """After it diverged: to a state of before the last allocation, in the same network."""
    made = network(toy)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
    train(made, toy, range(1, 21), optimizer)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    train(made, toy, range(21, TOTAL + 1), optimizer)
    expected = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.load_state_dict(before)
    train(made, toy, range(21, TOTAL + 1), optimizer)
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in expected.items())


def test_layers_with_a_rate_of_zero_take_no_part(toy) -> None:
    made = network(toy)
    frozen = adapters_of(made)[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.03)
    train(made, toy, range(1, TOTAL + 1), optimizer)
    assert frozen.lora_mask.all()
    assert not all(adapter.lora_mask.all() for adapter in adapters_of(made))


# -- files


@pytest.fixture
def trained(toy, tmp_path: Path) -> Callable[..., tuple[Network, Path]]:
    def make(**more: Any) -> tuple[Network, Path]:
        made = network(toy, **more)
        train(made, toy, range(1, TOTAL + 1), torch.optim.AdamW(made.parameters(), lr=0.03))
        made.save(tmp_path / "x.safetensors", None, None)
        return made, tmp_path / "x.safetensors"

    return make


def test_a_file_is_plain_lora_with_a_rank_of_its_own_in_each_layer(trained, toy) -> None:
    made, path = trained()
    expected = toy(pixels(0))
    made.detach()
    file = read(path)
    assert {layer.kind for layer in file.layers.values()} == {"lora"}
    ranks = {name: layer.tensors["lora_down.weight"].shape[0] for name, layer in file.layers.items()}
    left = {adapter.site.name: int(adapter.lora_mask.sum()) for adapter in adapters_of(made)}
    assert ranks == {name: rank for name, rank in left.items() if rank}
    assert len(set(ranks.values())) > 1
    for name, layer in file.layers.items():
        assert layer.tensors["alpha"].item() == (2.0 if name != "lora_unet_downsamplers_0" else 1.0)
    plain = lora_from_file(path, targets=[unet_targets(toy)])
    plain.attach()
    plain.load(file)
    torch.testing.assert_close(toy(pixels(0)), expected, rtol=1e-5, atol=1e-6)  # alpha / r is rounded once more


def test_its_own_form_is_read_to_go_on_training(trained, toy) -> None:
    made, path = trained(keep_form=True)
    expected = toy(pixels(0))
    made.detach()
    file = read(path)
    assert {layer.kind for layer in file.layers.values()} == {"adalora"}
    assert not any(name.endswith(("sensitivity", "lora_mask")) for name in file.tensors)
    other = create_from_file("adalora", file, [unet_targets(toy)], Asked(), {"keep_form": True})
    other.attach()
    other.load(file)
    assert torch.equal(toy(pixels(0)), expected)
    assert [adapter.form for adapter in adapters_of(other)] == [adapter.form for adapter in adapters_of(made)]
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in load_file(path).items())


def test_an_average_of_the_weights_keeps_no_more_ranks_than_the_run(trained, toy) -> None:
    """EMA never reaches 0: what is masked counts neither in the output nor in the file."""
    made, path = trained()
    kept = {name: tensor.shape for name, tensor in load_file(path).items()}
    with torch.no_grad():
        for adapter in adapters_of(made):
            adapter.lora_E.add_(0.01)
    expected = toy(pixels(0))
    assert {name: tensor.shape for name, tensor in made.tensors().items()} == kept
    made.detach()
    made.save(path, None, None)
    plain = lora_from_file(path, targets=[unet_targets(toy)])
    plain.attach()
    plain.load(read(path))
    torch.testing.assert_close(toy(pixels(0)), expected, rtol=1e-5, atol=1e-6)


def test_diffusers_loads_a_file_of_many_ranks(tiny, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    unet, text_encoder = tiny
    made = create("adalora", sd_targets(unet, text_encoder), Asked(dim=4, alpha=3.0, seed=1), {})
    made.attach()
    randomize(made, 0.3)
    with torch.no_grad():
        for place, adapter in enumerate(adapters_of(made)):
            adapter.lora_E[1 + place % 5 :] = 0
    expected = outputs(unet, text_encoder)
    made.save(tmp_path / "x.safetensors", None, None)
    pipeline = StableDiffusionPipeline.from_pretrained(
        BASE, dtype=torch.float32, safety_checker=None, feature_extractor=None
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    for actual, wanted in zip(outputs(pipeline.unet, pipeline.text_encoder), expected, strict=True):
        assert difference(actual, wanted) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tinit": 200.0}, "tinit: 200 is not in [0, 1): it is a share of the run's steps"),
        ({"tinit": 0.5, "tfinal": 0.5}, "tinit: 0.5 and tfinal: 0.5 leave no steps to allocate ranks in"),
        ({"deltaT": 0}, "deltaT: 0 is below 1"),
        ({"beta1": 1.0}, "beta1: 1 is not between 0 and 1"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight: -1 is below 0"),
        ({"init_r": 3}, "init_r: 3 is below 4, the rank that is to be left"),
    ],
)
def test_wrong_settings_are_named(toy, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create("adalora", [unet_targets(toy)], Asked(dim=4), arguments)
    assert str(caught.value) == message


def test_it_needs_the_whole_gradients(toy) -> None:
    refusal = network(toy).refuses("sharded_gradients")
    assert refusal is not None
    assert refusal.startswith("networks.adalora with DeepSpeed's ZeRO-2")
