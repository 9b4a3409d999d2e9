"""DyLoRA: the drawn block is trained, at the strength with which a file cut there acts."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import lora_from_file, randomize, unet_targets
from torch import Tensor, nn

from library.errors import UserError
from library.rng import uniform
from networks.create import create
from networks.dylora import DyLoRA
from networks.files import AdapterFile, read
from networks.lora import DOWN, UP
from networks.network import Network
from networks.settings import Asked
from networks.sites import Site


def network(toy: nn.Module, dim: int = 6, **more: Any) -> Network:
    made = create("dylora", [unet_targets(toy)], Asked(dim=dim, alpha=3.0, seed=1), {"conv_dim": dim, **more})
    made.attach()
    randomize(made, 0.5)
    return made


def on(layer: nn.Module, rank: int = 6, unit: int = 2) -> DyLoRA:
    made = DyLoRA(Site("x", "unet", "unet", layer), rank=rank, alpha=3.0, seed=1)
    made.unit = unit
    randomize(made, 0.5)
    made.attach()
    return made


def input_of(layer: nn.Module) -> Tensor:
    return torch.randn(5, 9).double() if isinstance(layer, nn.Linear) else torch.randn(2, 3, 5, 5).double()


@pytest.mark.parametrize("layer", [nn.Linear(9, 7), nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(3, 7, 1)])
def test_outputs_and_gradients_are_those_of_the_paper_for_each_block(layer: Any) -> None:
    layer = layer.double().requires_grad_(False)
    made = on(layer).double()
    x, base, seen = input_of(layer), made.base_forward, set()
    for seed in range(12):
        made.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        start = 2 * int(uniform() * 3)
        seen.add(start)
        end = start + 2
        torch.manual_seed(seed)
        y = layer(x)
        y.square().sum().backward()

        down, up = (w.detach().clone().requires_grad_() for w in (made.lora_down.weight, made.lora_up.weight))
        delta = (0.5 * math.sqrt(6 / end) * up.flatten(1)[:, :end] @ down.flatten(1)[:end]).view_as(layer.weight)
        if x.ndim == 2:
            expected = base(x) + x @ delta.T
        else:
            expected = base(x) + nn.functional.conv2d(x, delta, padding=layer.padding)
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        up_gradients = (made.lora_up.weight.grad.movedim(1, 0), up.grad.movedim(1, 0))
        for ours, theirs in ((made.lora_down.weight.grad, down.grad), up_gradients):
            torch.testing.assert_close(ours[start:end], theirs[start:end], rtol=1e-10, atol=1e-10)
            assert not ours[:start].any()
            assert not ours[end:].any()
    assert seen == {0, 2, 4}


def test_blocks_are_drawn_evenly_and_from_torchs_stream(toy) -> None:
    made = on(nn.Linear(4, 4), rank=4, unit=1)
    torch.manual_seed(0)
    drawn = [made.factors()[0].shape[0] for _ in range(4000)]
    counts = Counter(drawn)
    assert set(counts) == {1, 2, 3, 4}
    assert all(abs(count - 1000) < 5 * 27.4 for count in counts.values())  # five standard deviations
    torch.manual_seed(0)
    assert [made.factors()[0].shape[0] for _ in range(20)] == drawn[:20]


def test_a_checkpointed_forward_draws_the_same_block_twice(toy) -> None:
    from torch.utils.checkpoint import checkpoint

    made = network(toy)
    x = torch.randn(2, 4, 8, 8)
    gradients = []
    for run in (toy, lambda x: checkpoint(toy, x, use_reentrant=False)):
        made.zero_grad(set_to_none=True)
        torch.manual_seed(4)
        run(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in made.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_file_cut_to_fewer_ranks_acts_as_they_were_trained(toy) -> None:
    made = network(toy, unit=2)
    for end in (2, 4, 6):
        for adapter in made.adapters:
            seed = next(seed for seed in range(99) if _draws(seed, 3) == end // 2 - 1)
            torch.manual_seed(seed)
            adapter.train()
            hidden = torch.randn(3, adapter.site.module.weight.shape[1], *([4, 4] if adapter.rank_axis == 1 else []))
            torch.manual_seed(seed)
            trained = adapter.share(hidden)
            cut = {
                DOWN: adapter.lora_down.weight[:end].detach(),
                UP: adapter.lora_up.weight[:, :end].detach(),
                "alpha": adapter.alpha * math.sqrt(end / 6),
            }
            tensors = {f"{adapter.site.name}.{name}": tensor for name, tensor in cut.items()}
            plain = lora_from_file(AdapterFile.of(tensors, "x"), targets=[unet_targets(toy)])
            plain.load(AdapterFile.of(tensors, "x"))
            (other,) = plain.adapters
            torch.testing.assert_close(other.share(hidden), trained, rtol=1e-5, atol=1e-6)


def _draws(seed: int, blocks: int) -> int:
    torch.manual_seed(seed)
    return int(uniform() * blocks)


def test_outside_of_training_all_ranks_act(toy, tmp_path: Path) -> None:
    made = network(toy).eval()
    x = torch.randn(2, 4, 8, 8)
    expected = toy(x)
    assert torch.equal(toy(x), expected)
    made.save(tmp_path / "x.safetensors", None, None)
    made.detach()
    plain = lora_from_file(tmp_path / "x.safetensors", targets=[unet_targets(toy)])
    plain.attach()
    plain.load(read(tmp_path / "x.safetensors"))
    assert torch.equal(toy(x), expected)


def test_block_size_is_the_same_setting(toy) -> None:
    assert {adapter.unit for adapter in network(toy, block_size=3).adapters} == {3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": 4}, "unit: 4 does not divide 6, the rank of lora_unet_attentions_0_proj_in"),
        ({"block_size": 0}, "block_size: 0 does not divide 6, the rank of"),
        ({"unit": 2, "block_size": 2}, "unit and block_size: two names of one setting"),
        ({"conv_dim": 3}, "conv_dim: 3: networks.dylora wants the same as --network_dim, 6"),
    ],
)
def test_wrong_settings_are_named(toy, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create("dylora", [unet_targets(toy)], Asked(dim=6), arguments)
    assert str(caught.value).startswith(message)
