from __future__ import annotations

import math

import pytest
import torch
from adapter_models import Toy, lora, randomize, sd_targets, text_targets, unet_targets
from torch import nn

from library.errors import UserError
from networks.lora import LoRA, pair_shapes
from networks.settings import LearningRates
from networks.sites import Site, find_sites


def on_linear(inputs: int = 8, outputs: int = 6, *, rank: int = 4, alpha: float | None = 2.0, **options):
    """A frozen Linear, and its adapter, attached."""
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    adapter = LoRA(Site("lora_unet_x", "unet", "unet", layer), rank=rank, alpha=alpha, **options)
    adapter.attach()
    return layer, adapter


def test_forward_is_the_papers_formula():
    layer, adapter = on_linear(alpha=3.0)
    randomize(adapter, 0.5)
    x = torch.randn(5, 7, 8)
    expected = x @ layer.weight.T + layer.bias + 3.0 / 4 * (x @ adapter.lora_down.weight.T @ adapter.lora_up.weight.T)
    torch.testing.assert_close(layer(x), expected)


def test_first_step_has_the_gradients_of_a_bare_loop():
    """The bare loop: an adapter as in a tutorial, the scale on the output."""
    layer, adapter = on_linear(64, 48, rank=8, alpha=4.0)
    x = torch.randn(2, 77, 64)
    layer(x).square().mean().backward()
    down = adapter.lora_down.weight.detach().clone().requires_grad_()
    up = torch.zeros(48, 8, requires_grad=True)
    bare = x @ layer.weight.T + layer.bias + (x @ down.T @ up.T) * 0.5
    bare.square().mean().backward()
    torch.testing.assert_close(adapter.lora_up.weight.grad, up.grad, rtol=1e-5, atol=1e-7)
    assert not adapter.lora_down.weight.grad.any()  # up is 0 at the first step
    assert not down.grad.any()


@pytest.mark.parametrize("alpha", [None, 0, 4.0])
def test_alpha_none_or_zero_is_the_rank(alpha):
    _, adapter = on_linear(rank=4, alpha=alpha)
    assert adapter.alpha.item() == 4.0
    assert adapter.alpha.shape == ()
    assert adapter.scale == 1.0


def test_initial_weights_are_uniform_within_one_over_sqrt_fan_in():
    """kaiming_uniform with a = sqrt(5), as Microsoft's and kohya's LoRA."""
    _, adapter = on_linear(256, 64, rank=128, seed=1)
    bound = 1 / math.sqrt(256)
    assert adapter.lora_down.weight.abs().max() <= bound
    assert adapter.lora_down.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not adapter.lora_up.weight.any()


def test_initial_weights_depend_on_seed_and_name_only(toy):
    def weights(seed: int, targets) -> dict[str, torch.Tensor]:
        torch.rand(len(targets))  # the running stream stands elsewhere each time
        return lora(4, 1.0, targets=targets, seed=seed).state_dict()

    other = Toy()
    alone = weights(5, [unet_targets(toy)])
    beside = weights(5, [text_targets(_Text()), unet_targets(other)])
    assert alone.keys() < beside.keys()
    assert all(torch.equal(alone[key], beside[key]) for key in alone)
    assert not torch.equal(alone["lora_unet_attentions_0_to_q.lora_down.weight"],
                           weights(6, [unet_targets(toy)])["lora_unet_attentions_0_to_q.lora_down.weight"])  # fmt: skip
    q, k = (beside[f"lora_te_text_model_layer_self_attn_{x}.lora_down.weight"] for x in "qk")
    assert not torch.equal(q, k)


class _Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({"self_attn": nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)})})


def test_wider_kernels_take_conv_dim_and_the_rest_network_dim(toy):
    network = lora(4, 2.0, targets=[unet_targets(toy)], conv_dim=3, conv_alpha=1.5)
    assert {adapter.site.name: (adapter.rank, adapter.alpha.item()) for adapter in network.adapters} == {
        "lora_unet_downsamplers_0": (3, 1.5),
        "lora_unet_resnets_0": (4, 2.0),
        "lora_unet_attentions_0_proj_in": (4, 2.0),
        "lora_unet_attentions_0_to_q": (4, 2.0),
    }


def test_unset_dims_and_alphas_are_kohyas_defaults(toy):
    network = lora(None, None, targets=[unet_targets(toy)], conv_dim=8)
    assert {(adapter.rank, adapter.alpha.item()) for adapter in network.adapters} == {(4, 1.0), (8, 1.0)}


def test_without_conv_dim_only_the_attention_blocks_are_adapted(toy):
    network = lora(4, 1.0, targets=[unet_targets(toy)])
    assert [adapter.site.name for adapter in network.adapters] == [
        "lora_unet_attentions_0_proj_in",
        "lora_unet_attentions_0_to_q",
    ]


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match="text_encoder: no layer of this model matches"):
        find_sites([text_targets(nn.Sequential(nn.Linear(2, 2)))], conv=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "network_dim: 0 is not a rank"),
        ({"conv_dim": -1}, "conv_dim: -1 is not a rank"),
        ({"neuron_dropout": 1.0}, r"network_dropout: 1.0 is not in \[0, 1\)"),
        ({"rank_dropout": -0.1}, "rank_dropout: -0.1 is not in"),
        ({"module_dropout": 2}, "module_dropout: 2 is not in"),
    ],
)
def test_impossible_values_are_named(toy, options, message):
    with pytest.raises(UserError, match=message):
        lora(**{"dim": 4, "alpha": 1.0, **options}, targets=[unet_targets(toy)])


# -- dropout


def share(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What the adapter adds."""
    return layer(x) - (x @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout", "module_dropout"])
def test_dropout_works_in_training_only_and_draws_from_torchs_stream(kind):
    layer, adapter = on_linear(rank=16, **{kind: 0.5})
    randomize(adapter)
    x = torch.randn(4, 5, 8)
    outputs = []
    for seed in (0, 0, 1, 2, 3, 4):
        torch.manual_seed(seed)
        outputs.append(layer(x))
    assert torch.equal(outputs[0], outputs[1])
    assert any(not torch.equal(outputs[0], other) for other in outputs[2:])
    adapter.eval()
    torch.testing.assert_close(share(layer, x), x @ (adapter.delta().T))


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout"])
def test_dropout_makes_up_for_what_is_missing(kind):
    layer, adapter = on_linear(rank=16, **{kind: 0.3})
    randomize(adapter, 0.3)
    x = torch.randn(1, 8).expand(40000, 8)
    torch.manual_seed(0)
    mean = share(layer, x).mean(0)
    torch.testing.assert_close(mean, (x[:1] @ adapter.delta().T)[0], rtol=0.05, atol=0.005)


def test_rank_dropout_drops_the_same_ranks_in_all_of_a_sample():
    """[B, T, C] and [B, C, H, W]: with up the identity, a dropped rank is an output channel that is 0 throughout."""
    for shape, layer in (((3, 50, 8), nn.Linear(8, 8)), ((3, 8, 6, 6), nn.Conv2d(8, 8, 3, padding=1))):
        layer.requires_grad_(False)
        adapter = LoRA(Site("lora_unet_x", "unet", "unet", layer), rank=8, alpha=8, rank_dropout=0.5)
        adapter.lora_up.weight.data.copy_(torch.eye(8).view(adapter.lora_up.weight.shape))
        x = torch.randn(shape)
        base = layer(x)
        adapter.attach()
        torch.manual_seed(0)
        share = layer(x) - base
        tokens = share if share.ndim == 3 else share.flatten(2).transpose(1, 2)
        dropped = tokens.abs().amax(1) < 1e-6  # [B, r]
        assert 0 < dropped.sum() < dropped.numel()
        assert not torch.equal(dropped[0], dropped[1]) or not torch.equal(dropped[0], dropped[2])
        assert (tokens.abs().amin(1)[~dropped] > 0).all()


def test_module_dropout_leaves_the_adapter_out_without_making_up():
    layer, adapter = on_linear(module_dropout=0.5)
    randomize(adapter)
    x = torch.randn(4, 8)
    full, seen = x @ adapter.delta().T, set()
    for seed in range(20):
        torch.manual_seed(seed)
        added = share(layer, x)
        assert torch.allclose(added, full, atol=1e-6) or not added.any()
        seen.add(bool(added.any()))
    assert seen == {True, False}


# -- max norm


def kohya_max_norm(state: dict[str, torch.Tensor], limit: float) -> tuple[int, float, float]:
    """An independent form of kohya's `apply_max_norm_regularization`: the product itself, clamped from both sides."""
    norms, scaled = [], 0
    for key in [key for key in state if key.endswith("lora_down.weight")]:
        name = key.removesuffix(".lora_down.weight")
        down, up = state[key], state[f"{name}.lora_up.weight"]
        product = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)) * state[f"{name}.alpha"] / down.shape[0]
        norm = product.norm().clamp(min=limit / 2)
        ratio = (norm.clamp(max=limit) / norm).item()
        scaled += ratio != 1
        up *= ratio**0.5
        down *= ratio**0.5
        norms.append((product.norm() * ratio).item())
    return scaled, sum(norms) / len(norms), max(norms)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0, 100.0])
def test_max_norm_is_kohyas(toy, limit):
    network = lora(4, 2.0, targets=[unet_targets(toy)], conv_dim=2)
    randomize(network, 0.4)
    expected = {key: value.clone() for key, value in network.state_dict().items()}
    result = network.limit_norms(limit)
    assert result == pytest.approx(kohya_max_norm(expected, limit), rel=1e-5)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)


# -- learning rates


@pytest.fixture
def both(tiny):
    """A network on the text encoder and the UNet of the small base."""
    unet, text_encoder = tiny
    return lora(2, 1.0, targets=sd_targets(unet, text_encoder))


def summary(groups) -> list[tuple[str, float, int]]:
    return [(group["name"], group["lr"], len(group["params"])) for group in groups]


def test_each_part_has_a_group_with_its_rate(both):
    assert summary(both.groups(LearningRates(5e-5, 1e-4, 1e-3))) == [
        ("text_encoder", 5e-5, 2 * 18),
        ("unet", 1e-4, 2 * 120),
    ]


@pytest.mark.parametrize("text_encoder_lr", [None, []])
def test_a_rate_that_is_not_given_is_the_learning_rate(both, text_encoder_lr):
    groups = both.groups(LearningRates(text_encoder_lr, None, 1e-3))
    assert [group["lr"] for group in groups] == [1e-3, 1e-3]


def test_a_rate_of_zero_freezes_the_part_and_says_so(both, caplog):
    groups = both.groups(LearningRates(0.0, 1e-4, 1e-3))
    assert [group["name"] for group in groups] == ["unet"]
    assert "text_encoder: learning rate 0, its 18 adapters are not trained" in caplog.text
    assert sum(parameter.requires_grad for parameter in both.parameters()) == 2 * 120
    assert both.counts() == {"text_encoder": 18, "unet": 120}  # still in effect
    assert "text_encoder: 18 of these add nothing and are not in the file:\n  lora_te_text_model_enc" in caplog.text
    assert {key.split("_")[1] for key in both.tensors()} == {"unet"}


def test_a_frozen_part_that_adds_something_stays_in_the_file(both, caplog):
    """Loaded from a file, it is a part of what the LoRA does."""
    first, *others = [adapter for adapter in both.adapters if adapter.site.part == "text_encoder"]
    torch.nn.init.ones_(first.lora_up.weight)
    both.groups(LearningRates(0.0, 1e-4, 1e-3))
    assert "text_encoder: 17 of these add nothing and are not in the file" in caplog.text
    kept = {key.partition(".")[0] for key in both.tensors() if key.startswith("lora_te")}
    assert kept == {first.site.name}
    assert others[0].site.name in {key.partition(".")[0] for key in both.state_dict()}  # a run's state has all


def test_rates_of_zero_everywhere_are_an_error(both):
    with pytest.raises(UserError, match="nothing is trained: every learning rate is 0"):
        both.groups(LearningRates(0, 0, 1e-3))


def test_text_encoder_rates_may_be_a_list(both, toy):
    assert both.groups(LearningRates([3e-5], 1e-4, 1e-3))[0]["lr"] == 3e-5
    with pytest.raises(UserError, match="text_encoder_lr: 2 rates for 1 text encoder"):
        both.groups(LearningRates([3e-5, 1e-5], 1e-4, 1e-3))
    targets = [text_targets(_Text(), "lora_te1"), text_targets(_Text(), "lora_te2"), unet_targets(toy)]
    network = lora(2, 1.0, targets=targets)
    assert summary(network.groups(LearningRates([3e-5, 1e-5], None, 1e-3))) == [
        ("text_encoder_1", 3e-5, 4),
        ("text_encoder_2", 1e-5, 4),
        ("unet", 1e-3, 4),
    ]
    assert network.groups(LearningRates([3e-5], None, 1e-3))[1]["lr"] == 3e-5


def test_lora_plus_raises_the_rate_of_up(toy):
    options = {"loraplus_lr_ratio": 4.0, "loraplus_unet_lr_ratio": 16.0}
    targets = [text_targets(_Text()), unet_targets(toy)]
    network = lora(2, 1.0, targets=targets, **options)
    groups = network.groups(LearningRates(1e-5, 1e-4, 1e-3))
    assert [(group["name"], group["lr"], group.get("lora_plus_ratio")) for group in groups] == [
        ("text_encoder", 1e-5, None),
        ("text_encoder_plus", pytest.approx(4e-5), 4.0),
        ("unet", 1e-4, None),
        ("unet_plus", pytest.approx(16e-4), 16.0),
    ]
    up = {id(parameter) for name, parameter in network.named_parameters() if name.endswith("lora_up.weight")}
    raised = {id(parameter) for group in groups if "lora_plus_ratio" in group for parameter in group["params"]}
    assert raised == up


# -- parts


def test_parts_that_are_not_chosen_are_left_alone_and_not_saved(tiny):
    unet, text_encoder = tiny
    network = lora(2, 1.0, targets=sd_targets(unet, text_encoder))
    network.attach(("unet",))
    assert not any("forward" in vars(layer) for layer in text_encoder.modules())
    assert network.counts() == {"unet": 120}
    assert all(key.startswith("lora_unet_") for key in network.state_dict())


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3}])
def test_gradient_checkpointing_changes_nothing(options):
    """The recomputed forward must draw what the first one drew."""
    from torch.utils.checkpoint import checkpoint

    layer, adapter = on_linear(rank=16, **options)
    randomize(adapter)
    x = torch.randn(4, 5, 8, requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        for seed in range(5):
            torch.manual_seed(seed)
            run(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in (*adapter.parameters(), x)])
        for parameter in (*adapter.parameters(), x):
            parameter.grad = None
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_many_norms_at_once_are_those_of_each(toy_targets):
    """As on a GPU, where pairs of the same shapes are taken together."""
    network = lora(4, 2.0, targets=toy_targets, conv_dim=3)
    randomize(network, 0.5)
    adapters = list(network.adapters)
    alone = torch.stack([adapter.norm() for adapter in adapters])
    torch.testing.assert_close(torch.stack(LoRA._batched_norms(adapters)), alone)


@pytest.mark.parametrize("shape", [(12, 20), (12, 8, 3, 3), (9, 16, 1, 1)])
def test_from_delta_is_the_nearest_of_its_rank(shape):
    """Its error is the root of the sum of the squares of the singular values that are left out (Eckart, Young 1936)."""
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensors = LoRA.from_delta(delta, 3)
    assert {name: tuple(tensors[name].shape) for name in pair_shapes(shape, 3)} == {
        name: tuple(wanted) for name, wanted in pair_shapes(shape, 3).items()
    }
    error = (LoRA.delta_of(tensors, shape) - delta).norm()
    values = torch.linalg.svdvals(delta.flatten(1))
    torch.testing.assert_close(error, values[3:].square().sum().sqrt())
    full = LoRA.from_delta(delta, 1000)  # no more than it has
    assert LoRA.rank_of(full) == len(values)
    torch.testing.assert_close(LoRA.delta_of(full, shape), delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [3.0, 0.0, None])
def test_delta_of_tensors_without_an_adapter(alpha):
    """An alpha of 0, or none as in old files, is the rank."""
    down, up = torch.randn(4, 8), torch.randn(6, 4)
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    torch.testing.assert_close(LoRA.delta_of(tensors, (6, 8)), up @ down * ((alpha or 4) / 4))
