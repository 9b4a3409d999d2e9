"""Rates by block, by depth and by pattern: kohya's numbers, and groups in which everything is exactly once."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from adapter_models import lora, lora_from_file, sd_targets

from library.errors import UserError
from library.models.blocks import SD, SDXL, Blocks
from library.optimizers import CustomAdamW
from library.optimizers.custom_adamw.pairs import find_pairs
from networks import rates
from networks.files import AdapterFile
from networks.settings import LearningRates, RateSettings
from networks.sites import find_sites


def network(targets: Any, **arguments: Any) -> Any:
    return lora(2, 1.0, targets=targets, **arguments)


def weights_of(
    down: str | None, mid: str | None, up: str | None, threshold: float, *, blocks: Blocks | None = SD
) -> tuple[float, ...] | None:
    settings = RateSettings(down_lr_weight=down, mid_lr_weight=mid, up_lr_weight=up, block_lr_zero_threshold=threshold)
    return rates.block_weights(settings, blocks)


@pytest.fixture
def targets(tiny: Any) -> Any:
    return sd_targets(*tiny)


def groups_of(
    made: Any, *, unet_lr: float = 1.0, text_encoder_lr: float = 1.0, layer_decay: float | None = None
) -> dict[str, dict[str, Any]]:
    groups = made.groups(LearningRates(text_encoder_lr, unet_lr, 1.0, layer_decay))
    assert len({group["name"] for group in groups}) == len(groups)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in made.parameters() if parameter.requires_grad]
    assert sorted(members) == sorted(trained)  # each once, and nothing that has no rate
    assert all(len(group["params"]) == len(group["param_names"]) for group in groups)
    return {group["name"]: group for group in groups}


def rates_of(made: Any, **options: Any) -> dict[str, float]:
    return {name: group["lr"] for name, group in groups_of(made, **options).items()}


def test_blocks_have_kohyas_numbers(true_sizes: Any) -> None:
    """Those of SD 1.5: its attention blocks have 12 layers each, and with convolutions each of 1 … 24 has some."""
    counts: dict[int | None, int] = {}
    for site in find_sites(true_sizes["sd15"], conv=False):
        if site.part == "unet":
            counts[site.block] = counts.get(site.block, 0) + 1
    assert counts == dict.fromkeys([1, 2, 4, 5, 7, 8, 12, 16, 17, 18, 19, 20, 21, 22, 23, 24], 12)
    numbers = {
        site.name.removeprefix("lora_unet_"): site.block
        for site in find_sites(true_sizes["sd15"], conv=True)
        if not site.name.startswith("lora_te")
    }
    assert numbers["down_blocks_0_downsamplers_0_conv"] == 3
    assert numbers["down_blocks_3_resnets_1_conv2"] == 11
    assert numbers["mid_block_resnets_0_conv1"] == 12
    assert numbers["up_blocks_0_resnets_0_conv1"] == 13
    assert numbers["up_blocks_0_upsamplers_0_conv"] == 15
    assert numbers["up_blocks_3_resnets_2_conv_shortcut"] == 24
    assert set(numbers.values()) == set(range(1, 25))


def test_blocks_of_sdxl_have_kohyas_numbers(true_sizes: Any) -> None:
    """By the attention blocks' layers: 2 Linear each, and 10 in each of 1, 2 or 10 transformers."""
    sites = [site for site in find_sites(true_sizes["sdxl"], conv=False) if site.part == "unet"]
    counts = Counter(site.block for site in sites)
    small, large = 2 + 2 * 10, 2 + 10 * 10
    assert counts == {
        **dict.fromkeys([5, 6], small), **dict.fromkeys([8, 9], large), 11: large,
        **dict.fromkeys([13, 14, 15], large), **dict.fromkeys([16, 17, 18], small),
    }  # fmt: skip
    numbers = {site.name: site.block for site in find_sites(true_sizes["sdxl"], conv=True)}
    assert numbers["lora_unet_input_blocks_1_0_in_layers_2"] == 2
    assert numbers["lora_unet_input_blocks_6_0_op"] == 7
    assert numbers["lora_unet_middle_block_0_out_layers_3"] == 10
    assert numbers["lora_unet_middle_block_2_emb_layers_1"] == 12
    assert numbers["lora_unet_output_blocks_2_2_conv"] == 15
    assert numbers["lora_unet_output_blocks_8_0_skip_connection"] == 21
    assert set(numbers.values()) == {None, *range(2, 22)}


class TestBlocksOfSDXL:
    def test_weights(self) -> None:
        found = weights_of("linear", "0.5,0.5,0.25", "0,0,0,1,1,1,1,1,1", 0.0, blocks=SDXL)
        assert found == (1.0, *[i / 8 for i in range(9)], 0.5, 0.5, 0.25, *[0.0] * 3, *[1.0] * 6, 1.0)

    def test_groups(self, sdxl: Any) -> None:
        made = network(sdxl.adapter_targets(), mid_lr_weight="1,0.5,1", up_lr_weight="zeros")
        found = rates_of(made, unet_lr=1e-3, text_encoder_lr=1e-4)
        assert found["unet_block11"] == 5e-4
        assert found["unet_block5"] == 1e-3
        assert max(int(name.removeprefix("unet_block")) for name in found if name.startswith("unet")) == 11
        assert not any("output_blocks" in key for key in made.state_dict())

    def test_a_rate_for_each_text_encoder(self, sdxl: Any) -> None:
        made = network(sdxl.adapter_targets())
        found = {group["name"]: group["lr"] for group in made.groups(LearningRates([1e-4, 0.0], 1e-3, 1.0))}
        assert found == {"text_encoder_1": 1e-4, "unet": 1e-3}
        assert not any(p.requires_grad for name, p in made.named_parameters() if name.startswith("lora_te2"))
        with pytest.raises(UserError, match="3 rates for 2 text encoders"):
            made.groups(LearningRates([1.0, 1.0, 1.0], 1.0, 1.0))

    def test_layer_decay(self, sdxl: Any) -> None:
        made = network(sdxl.adapter_targets())
        found = rates_of(made, layer_decay=0.5)
        assert found["unet_block18"] == 1.0
        assert found["unet_block17"] == 0.5


class TestBlockDims:
    @staticmethod
    def ranks_of(made: Any) -> dict[int | None, set[tuple[int, float]]]:
        found: dict[int | None, set[tuple[int, float]]] = {}
        for adapter in made.adapters:
            number = adapter.site.block
            found.setdefault(number, set()).add((adapter.rank, adapter.alpha.item()))
        return found

    def test_sdxl(self, sdxl: Any) -> None:
        dims = [0] * 23
        dims[5], dims[11], dims[13] = 3, 5, 6
        words = ",".join(map(str, dims))
        found = self.ranks_of(network(sdxl.adapter_targets(), block_dims=words))
        assert found == {None: {(2, 1.0)}, 5: {(3, 1.0)}, 11: {(5, 1.0)}, 13: {(6, 1.0)}}
        alphas = ",".join(map(str, range(1, 24)))
        found = self.ranks_of(network(sdxl.adapter_targets(), block_dims=words, block_alphas=alphas))
        assert found == {None: {(2, 1.0)}, 5: {(3, 6.0)}, 11: {(5, 12.0)}, 13: {(6, 14.0)}}

    def test_convolutions(self, sdxl: Any) -> None:
        targets = sdxl.adapter_targets()
        made = network(targets, conv_block_dims=",".join(["0"] * 10 + ["7"] * 13), conv_block_alphas="3," * 22 + "3")
        kernels = {(a.site.spatial, a.rank, a.alpha.item()) for a in made.adapters if a.site.part == "unet"}
        assert kernels == {(False, 2, 1.0), (True, 7, 3.0)}
        assert not any("input_blocks" in a.site.name for a in made.adapters if a.site.spatial)
        # with ranks of blocks, conv_dim is that of every block, as in kohya
        made = network(targets, block_dims="3," * 22 + "3", conv_dim=2)
        assert {(a.site.spatial, a.rank) for a in made.adapters if a.site.part == "unet"} == {(False, 3), (True, 2)}

    def test_stable_diffusion_has_25(self, targets: Any) -> None:
        made = network(targets, block_dims=",".join(["0"] * 12 + ["4"] * 13))
        assert all("down_blocks" not in adapter.site.name for adapter in made.adapters)
        with pytest.raises(UserError, match="block_dims: 23 numbers for this model's 25 blocks: 12 down, 1 middle, 12"):
            network(targets, block_dims="4," * 22 + "4")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"block_dims": "4,4"}, "block_dims: 2 numbers for this model's 23 blocks: 1 embeddings, 9 down, 3 middle"),
            ({"block_dims": "x," * 22 + "4"}, "are not 23 numbers"),
            ({"block_dims": "4," * 22 + "-1"}, "block_dims: -1 is out of range"),
            ({"block_dims": "0," * 22 + "0"}, "block_dims: every block has rank 0"),
            ({"conv_block_alphas": "1,1"}, "conv_block_alphas: 2 numbers"),
        ],
    )
    def test_mistakes(self, sdxl: Any, given: dict[str, str], message: str) -> None:
        with pytest.raises(UserError, match=message):
            network(sdxl.adapter_targets(), **given)


class TestBlockWeights:
    def test_lists(self) -> None:
        down, up = [i / 20 for i in range(12)], [1 - i / 20 for i in range(12)]
        words = [",".join(map(str, values)) for values in (down, up)]
        assert weights_of(words[0], "0.5", words[1], 0.0) == (*down, 0.5, *up)
        assert weights_of(None, "0.5", None, 0.0) == (*[1.0] * 12, 0.5, *[1.0] * 12)
        assert weights_of(None, None, None, 0.0) is None

    @pytest.mark.parametrize(
        ("shape", "first", "fifth", "last"),
        [
            ("sine", 0.0, math.sin(math.pi * 4 / 22), 1.0),
            ("cosine", 1.0, math.sin(math.pi * 7 / 22), 0.0),
            ("linear", 0.0, 4 / 11, 1.0),
            ("reverse_linear", 1.0, 7 / 11, 0.0),
            ("zeros", 0.0, 0.0, 0.0),
        ],
    )
    def test_shapes(self, shape: str, first: float, fifth: float, last: float) -> None:
        for offset in (0.0, 0.25):
            found = weights_of(f"{shape}+{offset}", None, shape, 0.0)
            assert found is not None
            assert found[:12:11] == pytest.approx((first + offset, last + offset), abs=1e-12)
            assert found[4] == pytest.approx(fifth + offset)
            assert found[13 + 4] == pytest.approx(fifth)

    def test_threshold(self) -> None:
        found = weights_of("linear", None, None, 4 / 11)
        assert found is not None
        assert [weight > 0 for weight in found[:12]] == [False] * 5 + [True] * 7  # at the threshold it is 0, too

    @pytest.mark.parametrize(
        ("word", "said", "expected"),
        [("0,0.5", "2 values for 12 blocks, the others have 1", (0.0, 0.5, 1.0)), ("2," * 13, "14 values", (2.0,) * 3)],
    )
    def test_lists_of_another_length(self, word: str, said: str, expected: Any, caplog: Any) -> None:
        found = weights_of(word, None, None, 0.0)
        assert found is not None
        assert found[:3] == expected
        assert len(found) == 25
        assert said in caplog.text

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (("cosin", None, None, 0.0), "down_lr_weight: 'cosin' is neither a number.*did you mean 'cosine'"),
            ((None, "sine", None, 0.0), "mid_lr_weight: 'sine'"),
            ((None, None, "-1", 0.0), "up_lr_weight: -1 is not a weight"),
            ((None, None, "linear+x", 0.0), "up_lr_weight: 'x'"),
            ((None, None, None, 0.5), "block_lr_zero_threshold needs"),
        ],
    )
    def test_mistakes(self, given: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            weights_of(*given)

    def test_a_model_without_these_blocks_is_refused(self) -> None:
        with pytest.raises(UserError, match="up_lr_weight: this model has no numbered blocks"):
            weights_of(None, None, "1", 0.0, blocks=None)
        flat = Blocks((("single", 4), ("mid", 1)), 0, lambda name: None)
        with pytest.raises(UserError, match="down_lr_weight: this model has other blocks: 4 single, 1 mid"):
            weights_of("1", "1", None, 0.0, blocks=flat)

    def test_groups(self, targets: Any) -> None:
        made = network(targets, mid_lr_weight="0.5", up_lr_weight="2,2,2,2,2,2,2,2,2,2,2,2")
        found = rates_of(made, unet_lr=1e-3, text_encoder_lr=1e-4)
        assert found.pop("text_encoder") == 1e-4
        assert found["unet_block12"] == 5e-4
        assert {rate for name, rate in found.items() if int(name.removeprefix("unet_block")) < 12} == {1e-3}
        assert {rate for name, rate in found.items() if int(name.removeprefix("unet_block")) > 12} == {2e-3}

    def test_blocks_of_weight_zero_are_neither_made_nor_saved(self, targets: Any) -> None:
        made = network(targets, down_lr_weight="zeros")
        assert not any("_down_blocks_" in key for key in made.state_dict())
        assert network(targets).state_dict().keys() > made.state_dict().keys()
        assert all(int(name.removeprefix("unet_block")) >= 12 for name in rates_of(made) if name != "text_encoder")

    def test_from_a_file_they_stay_untrained(self, targets: Any, caplog: Any) -> None:
        weights = network(targets).state_dict()
        arguments: dict[str, Any] = {"targets": targets, "down_lr_weight": "zeros"}
        made = lora_from_file(AdapterFile.of(weights, "x"), **arguments)
        assert made.state_dict().keys() == weights.keys()
        rates_of(made)
        frozen = {name for name, parameter in made.named_parameters() if not parameter.requires_grad}
        assert frozen == {name for name, _ in made.named_parameters() if "_down_blocks_" in name}
        assert "unet_block1: learning rate 0, its" in caplog.text
        frozen_blocks = {key for key in weights if "_down_blocks_" in key}
        assert made.tensors().keys() == weights.keys() - frozen_blocks  # they add nothing
        made.load_state_dict({key: torch.ones_like(tensor) for key, tensor in weights.items()})
        assert made.tensors().keys() == weights.keys()

    def test_from_an_outline_nothing_is_left_out(self, targets: Any) -> None:
        """What the weights are is not known there."""
        made = network(targets, network_reg_lrs=".*attn2.*=0").to("meta")
        rates_of(made)
        assert made.tensors().keys() == made.state_dict().keys()


class TestLayerDecay:
    def test_the_formula(self, targets: Any) -> None:
        made = network(targets)
        found = rates_of(made, unet_lr=1e-3, text_encoder_lr=1e-4, layer_decay=0.9)
        for part, base in (("unet_block", 1e-3), ("text_encoder_layer", 1e-4)):
            numbers = sorted(int(name.removeprefix(part)) for name in found if name.startswith(part))
            n = len(numbers)
            assert [found[f"{part}{number}"] for number in numbers] == pytest.approx(
                [base * 0.9 ** (n - 1 - i) for i in range(n)]
            )
            assert n > 2

    def test_with_block_weights(self, targets: Any) -> None:
        made = network(targets, mid_lr_weight="0.5")
        found = rates_of(made, layer_decay=0.5)
        above = sum(name.startswith("unet_block") and int(name.removeprefix("unet_block")) > 12 for name in found)
        assert found["unet_block12"] == pytest.approx(0.5 * 0.5**above)

    def test_a_part_without_numbers_is_refused(self, toy_targets: Any) -> None:
        made = network(toy_targets)
        with pytest.raises(UserError, match="--lr_layer_decay: the unet has no numbered blocks"):
            made.groups(LearningRates(1.0, 1.0, 1.0, layer_decay=0.9))


class TestPatterns:
    def test_words(self) -> None:
        found = rates.pattern_rates(r" .*attn2.*=1e-4, down_blocks\.[0-9]{1,2}.*=2 ,(?=x)x=.5,")
        assert [(regex.pattern, rate) for regex, rate in found] == [
            (".*attn2.*", 1e-4),
            (r"down_blocks\.[0-9]{1,2}.*", 2.0),
            ("(?=x)x", 0.5),
        ]
        assert rates.pattern_rates(None) == rates.pattern_rates("") == []

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (".*attn2", "'.*attn2' is not of the form pattern=rate"),
            (".*=-1", "not of the form"),
            ("a=1,b", "'b' is not of the form"),
            ("[=1", "'\\[' is not a regular expression"),
        ],
    )
    def test_mistakes(self, words: str, message: str) -> None:
        with pytest.raises(UserError, match=f"network_reg_lrs: .*{message}"):
            rates.pattern_rates(words)

    def test_the_first_that_matches_decides_and_its_rate_is_absolute(self, targets: Any) -> None:
        made = network(targets, network_reg_lrs=".*attn2.*=3e-4,down_blocks.*=5e-4,lora_te_.*_q_proj=7e-5")
        groups = groups_of(made, unet_lr=1e-3, text_encoder_lr=1e-4)
        assert {name: group["lr"] for name, group in groups.items()} == {
            "text_encoder": 1e-4,
            "text_encoder_reg_lr_2": 7e-5,
            "unet": 1e-3,
            "unet_reg_lr_0": 3e-4,
            "unet_reg_lr_1": 5e-4,
        }
        assert all("attn2" in name for name in groups["unet_reg_lr_0"]["param_names"])
        assert all("down_blocks" in name for name in groups["unet_reg_lr_1"]["param_names"])

    def test_a_part_at_rate_zero_may_have_patterns_that_train(self, targets: Any) -> None:
        found = rates_of(network(targets, network_reg_lrs=".*attn2.*=3e-4"), unet_lr=0.0, text_encoder_lr=0.0)
        assert found == {"unet_reg_lr_0": 3e-4}

    def test_rate_zero_freezes_what_matches(self, targets: Any) -> None:
        made = network(targets, network_reg_lrs=".*attn2.*=0")
        assert set(rates_of(made)) == {"text_encoder", "unet"}
        assert not any(p.requires_grad for name, p in made.named_parameters() if "attn2" in name)

    @pytest.mark.parametrize(
        ("words", "why"),
        [("atn2=1", "matches nothing of the"), (".*=1,.*attn2.*=2", "matches only what earlier patterns match")],
    )
    def test_a_pattern_without_effect_is_an_error(self, targets: Any, words: str, why: str) -> None:
        with pytest.raises(UserError, match=f"network_reg_lrs: '.*' {why}"):
            network(targets, network_reg_lrs=words).groups(LearningRates(1.0, 1.0, 1.0))


def test_lora_plus_and_pairs_hold_across_all_groups(targets: Any) -> None:
    """Each group has its raised partner at the same ratio, and CustomAdamW finds all pairs."""
    made = network(targets, loraplus_lr_ratio=4.0, mid_lr_weight="0.5", network_reg_lrs=".*attn2.*=3e-4")
    groups = groups_of(made, layer_decay=0.8)
    plain = {name: group for name, group in groups.items() if not name.endswith("_plus")}
    assert len(groups) == 2 * len(plain)
    for name, group in plain.items():
        raised = groups[f"{name}_plus"]
        assert raised["lr"] == pytest.approx(4 * group["lr"])
        assert (raised["lora_plus_ratio"], group.get("lora_plus_ratio")) == (4.0, None)
        assert raised["lora_scale"] == group["lora_scale"] == 0.5
        assert (set(group["roles"]), set(raised["roles"])) == ({"down"}, {"up"})
        assert [id(down) for down in raised["partners"]] == [id(down) for down in group["params"]]
        halves = {"lora_down": group, "lora_up": raised}
        assert all(half in word for half, own in halves.items() for word in own["param_names"])
    named = [pair for group in groups.values() for pair in zip(group["param_names"], group["params"], strict=True)]
    assert len(find_pairs(named)) == len(list(made.adapters))
    optimizer = CustomAdamW([dict(group) for group in groups.values()], use_alora=True)
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.get_optimization_info()["lora_pairs"] == len(list(made.adapters))
