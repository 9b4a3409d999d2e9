"""LoHa against its formula in float64, and against LyCORIS."""

from __future__ import annotations

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
from networks.files import read
from networks.loha import LoHa
from networks.network import Network
from networks.settings import LearningRates

# Of rank 2 as a LoRA of rank 4, of rank 8 with delta itself
FORMS: dict[str, dict[str, Any]] = {
    "rank 2": {"dim": 2},
    "rank 8": {"dim": 8, "alpha": 2.0},
    "Tucker": {"dim": 2, "use_tucker": True},
    "Tucker of rank 15": {"dim": 15, "use_tucker": True},
    "DoRA of rows": {"dim": 2, "dora_wd": True, "wd_on_output": True},
    "DoRA of input channels": {"dim": 8, "dora_wd": True, "wd_on_output": False},
}


def closed_form(adapter: LoHa, weight: Tensor) -> Tensor:
    """The formula, in the dtype of the tensors."""
    own = dict(adapter.named_parameters())
    first, second = (
        torch.einsum("pqhw,po,qi->oihw", own[f"hada_t{i}"], own[f"hada_w{i}_a"], own[f"hada_w{i}_b"])
        if f"hada_t{i}" in own
        else own[f"hada_w{i}_a"] @ own[f"hada_w{i}_b"]
        for i in (1, 2)
    )
    direction = weight + adapter.alpha.item() / adapter.rank * (first * second).view(weight.shape)
    if "dora_scale" not in own:
        return direction
    axes = [axis for axis in range(weight.ndim) if own["dora_scale"].shape[axis] == 1]
    norm = torch.linalg.vector_norm(direction.detach(), dim=axes, keepdim=True)
    return direction * own["dora_scale"] / norm


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer_name", LAYERS)
def test_forward_and_gradients_are_those_of_the_formula(layer_name, form):
    check_formula("loha", layer_name, FORMS[form], closed_form)


def test_both_ways_to_compute_are_tested_here():
    ways = set()
    for layer_name in LAYERS:
        for form in FORMS.values():
            adapter = on_layer("loha", layer_and_input(layer_name)[0], **form)
            ways.add((adapter.has_cheap_pair, adapter.form.tucker))
    assert len(ways) == 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer_name", LAYERS)
def test_names_shapes_and_outputs_are_those_of_lycoris(layer_name, form):
    check_against_lycoris("loha", layer_name, FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer_name", LAYERS)
def test_norms_for_dora_and_of_delta_are_those_of_the_matrices(layer_name, form):
    check_norms("loha", layer_name, FORMS[form])


def test_first_values_have_lycoris_standard_deviations():
    layer = torch.nn.Conv2d(256, 256, 3).requires_grad_(False)
    adapter = on_layer("loha", layer, dim=16, use_tucker=True)
    spread = {name: tensor.std().item() for name, tensor in adapter.named_parameters()}
    assert spread == {
        "hada_t1": pytest.approx(0.1, rel=0.1),
        "hada_w1_a": pytest.approx(0.1, rel=0.1),
        "hada_w1_b": pytest.approx(1, rel=0.1),
        "hada_t2": pytest.approx(0.1, rel=0.1),
        "hada_w2_a": 0,
        "hada_w2_b": pytest.approx(1, rel=0.1),
    }


def test_tensors_in_the_layers_own_form_are_read_as_flat_ones():
    """OneTrainer writes a as [out, r, 1, 1] and b as [r, in, height, width]; without alpha the scale is 1."""
    layer, x = layer_and_input("conv3x3")
    adapter = on_layer("loha", layer, dim=2, alpha=2.0)
    randomize(adapter)
    expected = layer(x)
    adapter.detach()
    tensors = {name: tensor.clone() for name, tensor in adapter.state_dict().items() if name != "alpha"}
    for name in ("hada_w1_a", "hada_w2_a"):
        tensors[name] = tensors[name][:, :, None, None]
    for name in ("hada_w1_b", "hada_w2_b"):
        tensors[name] = tensors[name].view(2, *layer.weight.shape[1:])
    on_layer_from("loha", layer, tensors)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, 8])
def test_gradients_under_autocast_are_those_without(dtype, rank):
    """bf16 has 8 bits: 0.05 of the largest value is a dozen of its roundings."""
    layer, x = layer_and_input("linear", dtype)
    adapter = on_layer("loha", layer, dim=rank)
    randomize(adapter)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    output.float().square().sum().backward()
    found = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    adapter.zero_grad()
    adapter.detach()
    layer.float()
    adapter.attach()
    layer(x.float()).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        assert found[name].dtype == torch.float32
        assert (found[name] - parameter.grad).abs().max() <= 0.05 * parameter.grad.abs().max(), name


def test_a_layer_with_one_of_two_cores_is_refused(tmp_path: Path):
    from safetensors.torch import save_file

    tensors = {f"lora_unet_x.hada_w{i}_{half}": torch.ones(2, 2) for i in (1, 2) for half in "ab"}
    file = tmp_path / "x.safetensors"
    save_file(tensors | {"lora_unet_x.hada_t1": torch.ones(2, 2, 3, 3)}, file)
    with pytest.raises(UserError, match="has a hada_t1 and no hada_t2"):
        read(file)
    del tensors["lora_unet_x.hada_w2_b"]
    save_file(tensors, file)
    with pytest.raises(UserError, match="has a hada_w1_a and no hada_w2_b"):
        read(file)


def test_there_are_no_pairs_for_optimizers_and_lora_plus_raises_the_tensor_that_kohya_raises():
    layer, _ = layer_and_input("linear")
    adapter = on_layer("loha", layer)
    adapter.detach()
    groups = Network([adapter], plus_ratios={"unet": 4.0}).groups(LearningRates(None, 1e-4, 1e-4))
    assert not any(any(group["roles"]) or any(group["partners"]) for group in groups)
    (plus,) = [group for group in groups if "lora_plus_ratio" in group]
    assert plus["param_names"] == ["lora_unet_x.hada_w2_a"]


@pytest.mark.parametrize("form", ["rank 2", "rank 8", "Tucker"])
@pytest.mark.parametrize("layer_name", LAYERS)
def test_dropout_keeps_the_mean_and_drops_whole_ranks(layer_name, form):
    """The mean of many draws is what there is without. The bound is five standard errors of the draws themselves."""
    layer, x = layer_and_input(layer_name)
    adapter = on_layer("loha", layer, **FORMS[form], settings={"rank_dropout": 0.4}, dropout=0.3)
    randomize(adapter)
    torch.manual_seed(0)
    expected = adapter.eval().share(x)
    draws = torch.stack([adapter.train().share(x) for _ in range(400)])
    error = (draws.mean(0) - expected).abs()
    assert (error <= 5 * draws.std(0) / 20 + 1e-6).all()
    only_ranks = on_layer("loha", layer, **FORMS[form], settings={"rank_dropout": 0.999})
    randomize(only_ranks)
    assert not only_ranks.train().share(x).any()
