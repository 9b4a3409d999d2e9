"""Weights in 8 bits: as if they had been rounded beforehand, and nothing larger is kept for the backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.guidance.estimate import parameter_bytes
from library.models.opening import open_family
from library.quantization.fp8 import FLOAT8
from library.quantization.frozen import hold

LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (3, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 20, bias=False), (3, 12)),
    "conv 3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 9)),
    "conv stride 2": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "conv 1": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_acts_as_one_whose_weights_were_rounded(name: str, autocast: bool) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, rounded = make().to(torch.bfloat16), make().to(torch.bfloat16)
    rounded.load_state_dict(layer.state_dict())
    rounded.weight.data = rounded.weight.data.to(FLOAT8).to(torch.bfloat16)
    assert hold([("lora_unet it", layer)], "fp8") == 1
    assert layer.weight.dtype == FLOAT8
    assert layer.bias is None or layer.bias.dtype == torch.bfloat16

    inputs = [torch.randn(shape, dtype=torch.float32 if autocast else torch.bfloat16) for _ in range(2)]
    answers, gradients = [], []
    for module in (layer, rounded):
        x = inputs[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            answer = module(x)
        answer.backward(torch.ones_like(answer))
        assert x.grad is not None
        answers.append(answer)
        gradients.append(x.grad)
    assert answers[0].dtype == torch.bfloat16
    assert gradients[0].dtype == inputs[0].dtype
    for pair in (answers, gradients):  # summed in fp32, in whatever order, then rounded to bf16 once: 2⁻⁸ at most
        torch.testing.assert_close(*pair, rtol=2**-7, atol=1e-6)


def test_the_backward_pass_keeps_eight_bits() -> None:
    layer = nn.Linear(64, 64).to(torch.bfloat16)
    hold([("lora_unet it", layer)], "fp8")
    kept: list[Tensor] = []
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [(t.dtype, tuple(t.shape)) for t in kept] == [(FLOAT8, (64, 64))]


@pytest.mark.parametrize("value", [449.0, float("nan"), float("-inf")])
def test_what_does_not_fit_is_refused(value: float) -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 1] = value
    with pytest.raises(UserError, match="lora_unet it has weights beyond 448"):
        hold([("lora_unet it", layer)], "fp8")
    assert layer.weight.dtype == torch.float32


def test_a_model(tiny_sdxl: Path) -> None:
    family = open_family(str(tiny_sdxl))
    family.components.load_all(family.components.text_encoders, torch.bfloat16, "cpu")
    family.components.load("denoiser", torch.bfloat16, "cpu")
    noisy, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    sizes: dict[str, Any] = {"original_sizes": [(64, 64)], "crops": [(0, 0)], "target_size": (64, 64)}

    def answer() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return family.predict(noisy, t, family.condition(family.encode_prompts(["a cat"]), **sizes)).float()

    before, whole = answer(), parameter_bytes([family.components["denoiser"]])
    # Linear, 1 × 1 and wide convolutions of the UNet; the attention and MLP of two encoders of three layers
    assert family.components.hold("denoiser", "text_encoder", "text_encoder_2", format="fp8") == 192 + 65 + 18 + 18
    for kept in ("conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"):
        assert family.components["denoiser"].get_submodule(kept).weight.dtype == torch.bfloat16
    assert parameter_bytes([family.components["denoiser"]]) < 0.56 * whole
    # diffusers casts prompts to these
    assert family.components["denoiser"].dtype == family.components["text_encoder_2"].dtype == torch.bfloat16
    difference = (answer() - before).norm() / before.norm()
    assert 0 < difference < 0.1
