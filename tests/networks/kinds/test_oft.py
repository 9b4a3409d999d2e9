"""OFT against its formula in float64, LyCORIS' diag-oft and kohya's meaning of the options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from single_layers import LAYERS, fill, inputs, layer, same_as_lycoris, site

from library.errors import UserError
from networks.create import create
from networks.files import read
from networks.oft import OFT, Form, turn_of
from networks.settings import Asked


def made(form: str, *, rescaled: bool = False, constraint: float = 0.0, scale: float = 0.2) -> OFT:
    adapter = OFT(site(layer(form)), form=Form(4, 3, rescaled), constraint=constraint)
    fill(adapter, scale)
    return adapter


def rotated(
    weight: torch.Tensor, blocks: torch.Tensor, rescale: torch.Tensor | None, multiplier: float
) -> torch.Tensor:
    """W + m (g R^T W - W), block by block, as it is written."""
    rows = []
    for own, block in zip(weight.split(3), blocks, strict=True):
        skew, unit = block - block.T, torch.eye(3, dtype=block.dtype)
        rows.append(torch.tensordot(((unit + skew) @ torch.linalg.inv(unit - skew)).T, own, 1))
    turned = torch.cat(rows)
    if rescale is not None:
        turned = turned * rescale
    return weight + multiplier * (turned - weight)


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize("rescaled", [False, True])
def test_the_effective_weight_and_its_gradient_are_the_formulas(form: str, rescaled: bool) -> None:
    adapter = made(form, rescaled=rescaled)
    weight = adapter.site.module.weight
    ours = adapter.effective_weight(weight, adapter.tensors(), 0.7)
    double = {name: value.detach().double().requires_grad_() for name, value in adapter.named_parameters()}
    exact = rotated(weight.double(), double["oft_blocks"], double.get("rescale"), 0.7)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)  # fp32 has 7 digits
    towards = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6))
    (ours * towards).sum().backward()
    (exact * towards.double()).sum().backward()
    for name, value in adapter.named_parameters():
        torch.testing.assert_close(value.grad.double(), double[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", LAYERS)
def test_a_rotation_keeps_the_lengths_of_each_blocks_columns(form: str) -> None:
    adapter = made(form, scale=1.0)
    before, after = (
        value.detach().reshape(4, 3, -1).norm(dim=1)
        for value in (adapter.site.module.weight, adapter.site.module.weight + adapter.delta())
    )
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert adapter.delta().norm() > 1


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize("multiplier", [1.0, 0.6])
@pytest.mark.parametrize("constraint", [0.0, 0.02])  # the bound of 0.24 is far below |Q|
def test_it_is_lycoris_diag_oft(form: str, multiplier: float, constraint: float) -> None:
    lycoris = pytest.importorskip("lycoris.modules.diag_oft")
    adapter = made(form, constraint=constraint)
    same_as_lycoris(lycoris.DiagOFTModule, adapter, multiplier, lora_dim=3, constraint=constraint)


@pytest.mark.parametrize("form", LAYERS)
def test_it_is_lycoris_diag_oft_with_rescale_as_trained(form: str) -> None:
    """At the multiplier 1. At others LyCORIS rescales fully, so that 0 is not the base."""
    lycoris = pytest.importorskip("lycoris.modules.diag_oft")
    same_as_lycoris(lycoris.DiagOFTModule, made(form, rescaled=True), 1.0, lora_dim=3, rescaled=True)


def test_the_constraint_bounds_the_whole_layers_q() -> None:
    adapter = made("linear", constraint=0.02)
    turn = turn_of(adapter.oft_blocks, adapter.constraint)
    skew = torch.linalg.solve(turn + 2 * torch.eye(3), turn)  # the way back from R - I
    assert skew.norm().item() == pytest.approx(0.02 * 12, rel=1e-5)
    adapter.oft_blocks.data.mul_(1e-3)
    loose = OFT(adapter.site, form=adapter.form)
    loose.oft_blocks.data.copy_(adapter.oft_blocks.data)
    assert torch.equal(adapter.delta(), loose.delta())  # below the bound it changes nothing
    inside = adapter(inputs(adapter.site.module))
    assert torch.equal(inside, loose(inputs(adapter.site.module)))


SIZES: list[tuple[Asked, dict[str, Any], dict[int, tuple[int, int]]]] = [
    (Asked(), {}, {320: (4, 80), 640: (4, 160), 1280: (4, 320)}),  # kohya: 4 blocks
    (Asked(dim=8), {}, {320: (8, 40), 640: (8, 80), 1280: (8, 160)}),
    (Asked(dim=8), {"dim_is_size": True}, {320: (40, 8), 640: (80, 8), 1280: (160, 8)}),  # LyCORIS
    (Asked(dim=7), {"dim_is_size": True}, {320: (64, 5), 640: (128, 5), 1280: (256, 5)}),
]


@pytest.mark.parametrize(("asked", "arguments", "expected"), SIZES)
def test_network_dim_is_kohyas_number_of_blocks(asked: Asked, arguments: Any, expected: Any, true_sizes: Any) -> None:
    network = create("oft", true_sizes["sd15"], asked, arguments)
    assert network.counts() == {"unet": 128}  # attention alone: 16 blocks of 2 x (query, key, value, output)
    forms = {adapter.site.module.weight.shape[0]: adapter.form for adapter in network.adapters}
    assert {out: (form.count, form.size) for out, form in forms.items()} == expected


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ({"enable_all_linear": True}, {"unet": 192}),
        ({"enable_conv": True}, {"unet": 128 + 86}),
        (
            {"enable_all_linear": True, "enable_conv": True, "enable_text_encoder": True},
            {"text_encoder": 72, "unet": 278},
        ),
        ({"enable_text_encoder": True}, {"text_encoder": 48, "unet": 128}),
    ],
)
def test_more_layers_on_request(arguments: Any, counts: dict[str, int], true_sizes: Any) -> None:
    network = create("oft", true_sizes["sd15"], Asked(dim=8), {"conv_dim": 4, "dim_is_size": True, **arguments})
    assert network.counts() == counts
    sizes = {adapter.site.spatial: adapter.form.size for adapter in network.adapters}
    assert sizes == ({False: 8, True: 4} if "enable_conv" in arguments else {False: 8})


@pytest.mark.parametrize(
    ("asked", "arguments", "constraint"),
    [
        (Asked(alpha=1e-3), {}, 1e-3),
        (Asked(alpha=1.0), {}, 0.0),  # the option's default
        (Asked(alpha=1.0), {"constraint": 1e-4}, 1e-4),
        (Asked(alpha=1e-3), {"constraint": 0.0}, 0.0),
    ],
)
def test_network_alpha_below_1_is_the_constraint(
    asked: Asked, arguments: Any, constraint: float, true_sizes: Any
) -> None:
    network = create("oft", true_sizes["sd15"], asked, arguments)
    assert {adapter.constraint for adapter in network.adapters} == {constraint}


@pytest.mark.parametrize(
    ("asked", "arguments", "message"),
    [
        (
            Asked(dim=6),
            {},
            "attn1_to_q: network_dim 6: its 320 outputs do not divide into so many blocks; into 4 or 5 or 8",
        ),
        (Asked(dim=320), {}, "attn1_to_q: network_dim 320 makes blocks of 1 x 1, which rotate nothing"),
        (Asked(dim=1), {"dim_is_size": True}, "attn1_to_q: network_dim 1 makes blocks of 1 x 1"),
        (Asked(alpha=4), {"dim_is_size": True}, "network_alpha: 4 has no effect: networks.oft has no alpha"),
        (Asked(), {"enable_conv": True, "conv_dim": 7}, "conv_dim 7: its 320 outputs do not divide into so many"),
        (Asked(dim=0), {}, "network_dim: 0 is not positive"),
        (Asked(), {"constraint": -1.0}, "constraint: -1 is no bound"),
        (Asked(), {"constraint": float("nan")}, "constraint: nan is no bound"),
        (Asked(dropout=0.1), {}, "network_dropout: 0.1 has no effect: networks.oft has no dropout"),
    ],
)
def test_impossible_sizes_are_named(asked: Asked, arguments: Any, message: str, true_sizes: Any) -> None:
    with pytest.raises(UserError) as caught:
        create("oft", true_sizes["sd15"], asked, arguments)
    assert message in str(caught.value)


def test_kohyas_files_are_read(tmp_path: Path) -> None:
    tensors = {"oft_unet_mid_block_x.oft_blocks": torch.ones(3, 4, 4), "oft_unet_mid_block_x.alpha": torch.tensor(0.1)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = read(tmp_path / "x.safetensors", purpose="is merged")
    assert file.naming == "kohya"
    assert {name: layer.kind for name, layer in file.layers.items()} == {"lora_unet_mid_block_x": "oft"}
    tensors["oft_unet_mid_block_x.alpha"] = torch.tensor(0.0)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=r"oft_unet_mid_block_x.alpha is 0: kohya's networks.oft allows this layer no rotation"
    ):
        read(tmp_path / "x.safetensors")


def test_rotations_of_other_programs_are_named(tmp_path: Path) -> None:
    save_file({"lora_unet_x.oft_R.weight": torch.ones(3, 6)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"lora_unet_x has a oft_R.weight and no oft_blocks"):
        read(tmp_path / "x.safetensors", purpose="is merged")


def test_blocks_that_do_not_fit_are_named() -> None:
    module = layer("linear")
    with pytest.raises(UserError, match="lora_unet_x: 3 blocks of 5 x 5 in the file, for 12 outputs"):
        OFT.form_in(site(module), {"oft_blocks": torch.ones(3, 5, 5)})
