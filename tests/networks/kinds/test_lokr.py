"""LoKr against its formula in float64, and against LyCORIS."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from product_models import (
    LAYERS,
    check_against_lycoris,
    check_formula,
    check_norms,
    layer_and_input,
    on_layer,
    on_layer_from,
    randomize,
)
from torch import Tensor

from library.errors import UserError
from library.optimizers.custom_adamw.pairs import fit
from networks.create import create, create_from_file
from networks.files import read
from networks.lokr import LoKr, factorization
from networks.network import Network
from networks.settings import Asked, LearningRates

FORMS: dict[str, dict[str, Any]] = {
    "w2 a pair": {"dim": 2},
    "w2 a pair, factor 4": {"dim": 3, "factor": 4},
    "both pairs": {"dim": 1, "decompose_both": True},
    "Tucker": {"dim": 2, "use_tucker": True},
    "w2 whole": {"dim": 5},
    "w1 a pair, w2 whole": {"dim": 4, "factor": 2, "decompose_both": True, "unbalanced_factorization": True},
    "whole by the option": {"dim": 2, "full_matrix": True},
    "whole by an enormous rank": {"dim": 10_000_000, "alpha": 10_000_000.0},
    "DoRA of rows": {"dim": 2, "dora_wd": True, "wd_on_output": True},
    "DoRA of input channels": {"dim": 2, "dora_wd": True, "wd_on_output": False},
    "DoRA, whole": {"dim": 50, "dora_wd": True, "wd_on_output": True},
}


def closed_form(adapter: LoKr, weight: Tensor) -> Tensor:
    """The formula, by `torch.kron` of matrices; in the dtype of the tensors."""
    own = dict(adapter.named_parameters())
    w1 = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    if "lokr_w2" in own:
        w2 = own["lokr_w2"]
    elif "lokr_t2" in own:
        w2 = torch.einsum("pqhw,po,qi->oihw", own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
    else:
        w2 = own["lokr_w2_a"] @ own["lokr_w2_b"]
    whole = "lokr_w1" in own and "lokr_w2" in own
    scale = 1.0 if whole else adapter.alpha.item() / adapter.rank
    direction = weight + scale * torch.kron(w1, w2.flatten(1)).view(weight.shape)
    if "dora_scale" not in own:
        return direction
    axes = [axis for axis in range(weight.ndim) if own["dora_scale"].shape[axis] == 1]
    norm = torch.linalg.vector_norm(direction.detach(), dim=axes, keepdim=True)
    return direction * own["dora_scale"] / norm


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 7, 8, 10, 16, 64, 1000, 5000])
def test_sizes_are_split_as_lycoris_splits_them(factor):
    from lycoris.functional.general import factorization as theirs

    sizes = [*range(1, 70), 127, 250, 320, 360, 640, 768, 1024, 1280, 2048, 2560, 3072, 4096, 5120, 10240]
    assert [factorization(size, factor) for size in sizes] == [theirs(size, factor) for size in sizes]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer_name", LAYERS)
def test_forward_and_gradients_are_those_of_the_formula(layer_name, form):
    check_formula("lokr", layer_name, FORMS[form], closed_form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer_name", LAYERS)
def test_names_shapes_and_outputs_are_those_of_lycoris(layer_name, form):
    check_against_lycoris("lokr", layer_name, FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer_name", LAYERS)
def test_norms_for_dora_and_of_delta_are_those_of_the_matrices(layer_name, form):
    check_norms("lokr", layer_name, FORMS[form])


def test_alpha_has_no_effect_where_both_factors_are_whole_and_fits_fp16():
    """ComfyUI and others ignore it there; LyCORIS' files with a rank for "whole" have infinity in fp16."""
    layer, x = layer_and_input("linear")
    adapter = on_layer("lokr", layer, dim=10_000_000, alpha=1.0)
    randomize(adapter)
    assert adapter.scale == 1
    assert adapter.alpha.half().isfinite()
    expected = layer(x)
    adapter.detach()
    tensors = {**adapter.state_dict(), "alpha": torch.tensor(torch.inf, dtype=torch.float16)}
    other = on_layer_from("lokr", layer, tensors)
    assert torch.equal(layer(x), expected)
    assert other.state_dict()["alpha"].isfinite()
    effective = LoKr.effective_weight(layer.weight, tensors, 1.0)
    torch.testing.assert_close(effective, layer.weight + adapter.delta())


def test_a_file_with_an_infinite_alpha_is_read_where_alpha_has_no_effect(tmp_path: Path):
    from safetensors.torch import save_file

    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(3, 4)}
    file = tmp_path / "whole.safetensors"
    save_file({**tensors, f"{name}.alpha": torch.tensor(torch.inf)}, file)
    assert read(file).layers[name].kind == "lokr"
    save_file(
        {f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2_a": torch.ones(3, 1)}
        | {f"{name}.lokr_w2_b": torch.ones(1, 4), f"{name}.alpha": torch.tensor(torch.inf)},
        file,
    )
    with pytest.raises(UserError, match=r"alpha holds NaN or infinity"):
        read(file)


def test_a_factor_that_divides_nothing_takes_lycoris_pair_and_is_logged_once(toy_targets, caplog):
    with caplog.at_level(logging.WARNING):
        create("lokr", toy_targets, Asked(dim=1), {"factor": 4})
    (record,) = caplog.records
    assert record.getMessage() == (
        "factor: 4 divides not both sizes of 1 of 2 layers, which take the nearest below it, such as "
        "lora_unet_attentions_0_to_q: 6 = 2 x 3 outputs, 8 = 2 x 4 inputs"
    )
    caplog.clear()
    create("lokr", toy_targets, Asked(dim=1), {"factor": 2})
    assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 0}, "factor: 0 is out of range"),
        ({"factor": -2}, "factor: -2 is out of range"),
        ({"full_matrix": True, "decompose_both": True}, "decompose_both: has no effect with full_matrix"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(toy_targets, arguments, message):
    with pytest.raises(UserError, match=message):
        create("lokr", toy_targets, Asked(dim=1), arguments)


@pytest.mark.parametrize("w1", [(4, 4), (5, 4), (2, 2)])
def test_a_file_for_other_sizes_is_refused(toy, toy_targets, tmp_path: Path, w1):
    """w1 and w2 together must make the layer's weight, here [6, 8]."""
    from safetensors.torch import save_file

    name = "lora_unet_attentions_0_to_q"
    file = tmp_path / "x.safetensors"
    save_file({f"{name}.lokr_w1": torch.ones(w1), f"{name}.lokr_w2": torch.ones(2, 2)}, file)
    content = read(file)
    network = create_from_file("lokr", content, toy_targets, Asked())
    network.attach()
    with pytest.raises(UserError, match=rf"{name}\.lokr_w"):
        network.load(content)


def test_a_layer_with_half_of_a_pair_is_refused(tmp_path: Path):
    from safetensors.torch import save_file

    file = tmp_path / "x.safetensors"
    save_file({"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2_a": torch.ones(2, 2)}, file)
    with pytest.raises(UserError, match="has a lokr_w1 and no lokr_w2_b"):
        read(file)
    save_file({"lora_unet_x.lokr_w1": torch.ones(2, 2)}, file)
    with pytest.raises(UserError, match="has a lokr_w1 and no lokr_w2"):
        read(file)


def test_only_a_plain_product_is_a_pair_for_optimizers():
    layer, _ = layer_and_input("conv3x3")
    for form, paired in (("w2 a pair", True), ("both pairs", True), ("Tucker", False), ("w2 whole", False)):
        adapter = on_layer("lokr", layer, **FORMS[form])
        adapter.detach()
        network = Network([adapter])
        groups = network.groups(LearningRates(None, 1e-4, 1e-4))
        partners = [
            (name.rpartition(".")[2], parameter, partner)
            for group in groups
            for name, parameter, partner in zip(group["param_names"], group["params"], group["partners"], strict=True)
            if partner is not None
        ]
        assert [name for name, _, _ in partners] == ["lokr_w2_a"] * paired
        assert all(fit(up, down) for _, up, down in partners)


def test_lora_plus_raises_w1_as_kohya_does():
    layer, _ = layer_and_input("linear")
    for form, raised in (("w2 whole", {"lokr_w1"}), ("both pairs", {"lokr_w1_a", "lokr_w1_b"})):
        adapter = on_layer("lokr", layer, **FORMS[form])
        adapter.detach()
        groups = Network([adapter], plus_ratios={"unet": 4.0}).groups(LearningRates(None, 1e-4, 1e-4))
        (plus,) = [group for group in groups if "lora_plus_ratio" in group]
        assert {name.rpartition(".")[2] for name in plus["param_names"]} == raised


@pytest.mark.parametrize("form", ["w2 a pair", "w2 whole", "both pairs", "Tucker"])
@pytest.mark.parametrize("layer_name", LAYERS)
def test_dropout_keeps_the_mean_and_drops_whole_ranks(layer_name, form):
    """The mean of many draws is what there is without. The bound is five standard errors of the draws themselves."""
    layer, x = layer_and_input(layer_name)
    options = {"settings": {"rank_dropout": 0.4}, "dropout": 0.3}
    adapter = on_layer("lokr", layer, **FORMS[form], **options)
    randomize(adapter)
    torch.manual_seed(0)
    expected = adapter.eval().share(x)
    draws = torch.stack([adapter.train().share(x) for _ in range(400)])
    error = (draws.mean(0) - expected).abs()
    assert (error <= 5 * draws.std(0) / 20 + 1e-6).all()
    only_ranks = on_layer("lokr", layer, **FORMS[form], settings={"rank_dropout": 0.999})
    randomize(only_ranks)
    assert not only_ranks.train().share(x).any()
