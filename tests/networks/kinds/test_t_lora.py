"""T-LoRA: as many ranks as the noise leaves, per image, in training alone; the file is a plain LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_models import randomize, unet_targets
from torch import nn

from library.errors import UserError
from networks.create import create
from networks.lora import LoRA
from networks.settings import Asked
from networks.sites import Site
from networks.t_lora import Settings, TLoRA, mask_of


def adapter_on(layer: nn.Module, part: str = "unet", **settings: Any) -> TLoRA:
    made = TLoRA(Site("x", part, part, layer), rank=6, alpha=3.0)
    made.take(Settings(**settings))
    made.attach()
    randomize(made)
    return made


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_papers_number_of_ranks(power: float) -> None:
    """⌊((T − t) / T)^a (r − r_min)⌋ + r_min, as LyCORIS computes it for one timestep."""
    tlora = pytest.importorskip("lycoris.modules.tlora")
    steps = torch.tensor([0, 1, 249, 250, 500, 777, 999])
    expected = torch.cat([tlora.compute_timestep_mask(int(t), 1000, 16, 8, power) for t in steps])
    assert torch.equal(mask_of(steps / 1000, 16, 8, power).float(), expected)
    assert expected.sum(1)[0] == 16
    assert expected.sum(1)[-1] == 8


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Conv2d(5, 7, 3, padding=1)], ids=["linear", "conv"])
def test_each_image_passes_through_its_own_ranks(layer: nn.Module) -> None:
    made = adapter_on(layer, min_rank=2)
    x = torch.randn(3, 4, 5) if isinstance(layer, nn.Linear) else torch.randn(3, 5, 4, 4)
    shares = torch.tensor([0.0, 0.5, 1.0])
    TLoRA.at_noise([made], shares)
    base = made.base_forward(x)
    for image, ranks in enumerate((6, 4, 2)):  # ⌊0.5 · 4⌋ + 2
        cut = LoRA(made.site, rank=ranks, alpha=3.0 * ranks / 6)  # the same alpha / r
        cut.lora_down.weight.data = made.lora_down.weight.detach()[:ranks]
        cut.lora_up.weight.data = made.lora_up.weight.detach()[:, :ranks]
        expected = cut.share(x[image : image + 1])
        actual = layer(x)[image : image + 1] - base[image : image + 1]
        assert torch.allclose(actual, expected, atol=1e-5)  # sums of up to 45 products of unit size in fp32
    whole = made.eval()
    plain = LoRA(made.site, rank=6, alpha=3.0)
    plain.load_state_dict(made.state_dict())
    assert torch.equal(whole(x), plain.with_share(x)) or torch.allclose(whole(x) - base, plain.share(x), atol=1e-5)


def test_the_text_encoders_keep_all_ranks() -> None:
    made, x = adapter_on(nn.Linear(5, 7), "text_encoder", min_rank=1), torch.randn(3, 4, 5)
    before = made(x)
    TLoRA.at_noise([made], torch.ones(3))
    assert torch.equal(made(x), before)


def test_noise_alone_trains_the_first_ranks_alone(toy: Any) -> None:
    network = create("t_lora", [unet_targets(toy)], Asked(dim=4, alpha=4, seed=1), {"min_rank": 1})
    network.attach()
    randomize(network)
    network.at_noise(torch.ones(2))
    toy(torch.randn(2, 4, 8, 8)).square().sum().backward()
    for adapter in network.adapters:
        assert isinstance(adapter, TLoRA)
        down, up = adapter.lora_down.weight.grad, adapter.lora_up.weight.grad
        assert down is not None
        assert up is not None
        assert down[0].any()
        assert up[:, 0].any()
        assert not down[1:].any()
        assert not up[:, 1:].any()


def test_a_least_rank_is_half_the_rank_unless_it_is_given(toy: Any) -> None:
    network = create("t_lora", [unet_targets(toy)], Asked(dim=5, alpha=1, seed=1))
    assert {adapter.least for adapter in network.adapters if isinstance(adapter, TLoRA)} == {3}
    with pytest.raises(UserError, match=r"min_rank: 6 is not in 1 … 5, the rank of lora_unet_"):
        create("t_lora", [unet_targets(toy)], Asked(dim=5, alpha=1, seed=1), {"min_rank": 6})
    with pytest.raises(UserError, match=r"noise_power: 0 is not above 0"):
        create("t_lora", [unet_targets(toy)], Asked(dim=5, alpha=1, seed=1), {"noise_power": 0.0})
