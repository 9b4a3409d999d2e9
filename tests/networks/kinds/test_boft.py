"""BOFT against its formula in float64 and LyCORIS' boft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from single_layers import LAYERS, fill, inputs, layer, same_as_lycoris, site
from torch import Tensor

from library.errors import UserError
from networks.boft import BOFT, through_stages
from networks.create import create
from networks.oft import Form, turn_of
from networks.settings import Asked

OUT, SIZE, COUNT, STAGES = 24, 6, 4, 3  # 4 blocks of 6 x 6, and log2(4) + 1 stages


def made(form: str, *, rescaled: bool = False, constraint: float = 0.0) -> BOFT:
    adapter = BOFT(site(layer(form, out=OUT)), form=Form(COUNT, SIZE, rescaled, STAGES), constraint=constraint)
    fill(adapter)
    return adapter


def matrix(blocks: Tensor, multiplier: float) -> Tensor:
    """The product of the stages, each as a dense matrix: block k of stage j turns the rows that lie at its places."""
    out = blocks.shape[1] * SIZE
    whole = torch.eye(out, dtype=blocks.dtype)
    for stage, own in enumerate(blocks):
        half = 2**stage * SIZE // 2
        order = torch.arange(out).view(-1, 2, half).transpose(1, 2).flatten()  # a block's rows, one from either half
        dense = torch.zeros(out, out, dtype=blocks.dtype)
        for block, places in zip(own, order.view(-1, SIZE), strict=True):
            skew, unit = block - block.T, torch.eye(SIZE, dtype=block.dtype)
            turn = (unit + skew) @ torch.linalg.inv(unit - skew)
            dense = dense.index_put((places[:, None], places), multiplier * turn + (1 - multiplier) * unit)
        whole = dense @ whole
    return whole


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize("multiplier", [1.0, 0.7])
def test_the_effective_weight_and_its_gradient_are_the_formulas(form: str, multiplier: float) -> None:
    adapter = made(form, rescaled=True)
    weight = adapter.site.module.weight
    ours = adapter.effective_weight(weight, adapter.tensors(), multiplier)
    double = {name: value.detach().double().requires_grad_() for name, value in adapter.named_parameters()}
    turned = torch.tensordot(matrix(double["oft_blocks"], multiplier), weight.double(), 1)
    exact = turned * (1 + multiplier * (double["rescale"] - 1))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)  # fp32 has 7 digits
    towards = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6))
    (ours * towards).sum().backward()
    (exact * towards.double()).sum().backward()
    for name, value in adapter.named_parameters():
        torch.testing.assert_close(value.grad.double(), double[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stages", range(1, 8))  # up to 4 of this size act as one product
def test_stages_that_act_together_are_those_that_act_one_by_one(stages: int) -> None:
    generator = torch.Generator().manual_seed(stages)
    blocks = torch.randn(stages, 64, SIZE, SIZE, generator=generator) * 0.2
    rows = torch.randn(64 * SIZE, 5, generator=generator)
    exact = matrix(blocks.double(), 1.0) @ rows.double()
    torch.testing.assert_close(through_stages(rows, turn_of(blocks, 0.0)).double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", LAYERS)
def test_the_whole_rotation_keeps_the_lengths_of_columns(form: str) -> None:
    adapter = made(form)
    weight = adapter.site.module.weight
    before, after = (value.detach().flatten(1).norm(dim=0) for value in (weight, weight + adapter.delta()))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert adapter.delta().norm() > 1


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize("multiplier", [1.0, 0.6])
@pytest.mark.parametrize("constraint", [0.0, 0.02])
def test_it_is_lycoris_boft(form: str, multiplier: float, constraint: float) -> None:
    lycoris = pytest.importorskip("lycoris.modules.boft")
    adapter = made(form, constraint=constraint)
    same_as_lycoris(lycoris.ButterflyOFTModule, adapter, multiplier, lora_dim=SIZE, constraint=constraint)


@pytest.mark.parametrize("form", LAYERS)
def test_it_is_lycoris_boft_with_rescale_as_trained(form: str) -> None:
    """At the multiplier 1. At others LyCORIS rescales fully, so that 0 is not the base."""
    lycoris = pytest.importorskip("lycoris.modules.boft")
    same_as_lycoris(lycoris.ButterflyOFTModule, made(form, rescaled=True), 1.0, lora_dim=SIZE, rescaled=True)


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_the_output_and_turning_the_weight_are_the_same(form: str, dtype: torch.dtype) -> None:
    """Which of them runs depends on the sizes. bf16 has 8 bits: 1% of the largest value."""
    adapter = made(form, rescaled=True)
    adapter.site.module.to(dtype)
    x = inputs(adapter.site.module).to(dtype)
    many = x.repeat(40, *(1,) * (x.ndim - 1))
    few = x[:1, :1] if x.ndim == 3 else x[:1, :, :1, :1]
    assert 2 * few.numel() // 8 <= adapter.site.module.weight[0].numel() < 2 * many.numel() // 8
    by_output, by_weight = adapter(few), adapter(few.repeat(many.numel() // few.numel(), *(1,) * (x.ndim - 1)))[:1]
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(by_output, by_weight, rtol=0, atol=bound * 10 * by_weight.abs().max().item())
    adapter.initialise()
    for places in (few, many):
        assert torch.equal(adapter(places), adapter.base_forward(places))


def test_sizes_are_lycoris(true_sizes: Any) -> None:
    network = create("boft", true_sizes["sd15"], Asked(dim=12), {"conv_dim": 20})
    forms = {(adapter.site.spatial, adapter.site.module.weight.shape[0]): adapter.form for adapter in network.adapters}
    lycoris = pytest.importorskip("lycoris.modules.boft")
    for (spatial, out), form in forms.items():
        assert (form.size, form.count) == lycoris.butterfly_factor(out, 20 if spatial else 12)
        adapter = next(one for one in network.adapters if one.form == form)
        stages = form.count.bit_length()
        assert adapter.oft_blocks.shape == (stages, form.count, form.size, form.size)
    assert network.counts() == {"text_encoder": 72, "unet": 278}


@pytest.mark.parametrize(
    ("asked", "arguments", "message"),
    [
        (
            Asked(dim=8),
            {},
            "attentions_0_proj_in: no even block size of at most 8 (network_dim) goes 1, 2, 4, 8 … times into its 320 "
            "outputs; 10, 20, 40, 80 do",
        ),
        (Asked(dim=12), {"conv_dim": 8}, "no even block size of at most 8 (conv_dim) goes 1, 2, 4, 8 … times into its"),
        (Asked(dim=-1), {}, "network_dim: -1 is not positive"),
        (Asked(dim=12), {"constraint": -1.0}, "constraint: -1 is no bound"),
        (Asked(dim=12, alpha=4), {}, "network_alpha: 4 has no effect: networks.boft has no alpha"),
    ],
)
def test_impossible_sizes_are_named(asked: Asked, arguments: Any, message: str, true_sizes: Any) -> None:
    with pytest.raises(UserError) as caught:
        create("boft", true_sizes["sd15"], asked, arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 5, 6, 6), (4, 4, 6, 6), (1, 8, 3, 3)])
def test_blocks_that_do_not_fit_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"lora_unet_x: {shape[0]} stages of {shape[1]} blocks of .* for 24 outputs"):
        BOFT.form_in(site(layer("linear", out=OUT)), {"oft_blocks": torch.ones(shape)})
