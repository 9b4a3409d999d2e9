"""rsLoRA: alpha is written as alpha * sqrt(r), so that a file's alpha / r is the scale that was trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import single_layers
import torch
from adapter_models import BASE, difference, lora, outputs, randomize, sd_targets, unet_targets
from safetensors.torch import load_file

from networks.adapter import WithRank
from networks.create import create
from networks.kinds import KINDS, load
from networks.lora import LoRA
from networks.network import Network
from networks.oft import OFT, Form
from networks.settings import Asked


def has_alpha(kind: str) -> bool:
    """Whether the alpha that is asked for changes that of an adapter: VeRA has none."""
    adapter = load(kind)
    if not issubclass(adapter, WithRank):
        return False
    sizes = adapter.SIZES()
    return adapter.sized(4, 3.0, sizes)[1] != adapter.sized(4, 4.0, sizes)[1]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if has_alpha(kind)])
def test_every_kind_with_a_rank_and_an_alpha_scales_by_its_root(kind, toy) -> None:
    asked = Asked(dim=2, alpha=3.0, seed=1)
    sizes = {"conv_dim": 2, "conv_alpha": 3.0} | ({"factor": 1} if kind == "lokr" else {})  # so that it has a rank
    plain = create(kind, [unet_targets(toy)], asked, sizes)
    rooted = create(kind, [unet_targets(toy)], asked, {**sizes, "rs_lora": True})
    for one, other in zip(plain.adapters, rooted.adapters, strict=True):
        assert one.scale == pytest.approx(1.5)
        assert other.scale == pytest.approx(3 / 2**0.5)
        assert other.alpha.item() / other.rank == pytest.approx(other.scale)


def test_no_alpha_means_the_rank_before_the_root(toy) -> None:
    network = lora(9, 0.0, targets=[unet_targets(toy)], rs_lora=True)
    assert {adapter.alpha.item() for adapter in network.adapters} == {27.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_run_trains_with_the_scale_of_its_states_and_files(dtype) -> None:
    """No alpha of 0.3 is exact in a file or a state: the last bit of alpha / 5 was another one in a resumed run."""
    lora = LoRA(single_layers.site(single_layers.layer("linear")), rank=5, alpha=0.3)
    oft = OFT(replace(lora.site, name="lora_unet_y"), form=Form(3, 4), constraint=0.3)
    network = Network([lora, oft]).to(dtype)
    network.before_training(gradient_checkpointing=False)
    before = lora.scale, lora.factor, oft.constraint
    network.load_state_dict(network.state_dict())
    assert (lora.scale, lora.factor, oft.constraint) == before


def test_an_alpha_that_the_type_of_a_file_would_round_keeps_its_own(tmp_path) -> None:
    for alpha, kept in ((0.3, torch.float32), (0.25, torch.float16)):
        adapter = LoRA(single_layers.site(single_layers.layer("linear")), rank=2, alpha=alpha)
        Network([adapter]).save(tmp_path / "x.safetensors", torch.float16, None)
        tensors = load_file(tmp_path / "x.safetensors")
        assert tensors["lora_unet_x.lora_up.weight"].dtype == torch.float16
        assert tensors["lora_unet_x.alpha"].dtype == kept
        assert torch.equal(tensors["lora_unet_x.alpha"].float(), adapter.alpha)


def test_a_file_acts_as_in_peft_with_rslora(tiny, tmp_path) -> None:
    """peft's own rsLoRA on the same tensors; in fp32 the orders of products differ, nothing else."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, inject_adapter_in_model

    unet, text_encoder = tiny
    network = lora(4, 3.0, targets=sd_targets(unet, text_encoder), rs_lora=True)
    network.attach(["unet"])
    randomize(network, 0.2)
    network.save(tmp_path / "x.safetensors", None, None)
    tensors = load_file(tmp_path / "x.safetensors")
    assert {tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")} == {6.0}

    theirs = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", dtype=torch.float32).eval()
    paths = [adapter.site.path for adapter in network.adapters]
    ours = {adapter.site.path: adapter for adapter in network.adapters}
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=paths)
    inject_adapter_in_model(config, theirs)
    with torch.no_grad():
        for path, adapter in ours.items():
            layer = theirs.get_submodule(path)
            layer.lora_A.default.weight.copy_(adapter.lora_down.weight)
            layer.lora_B.default.weight.copy_(adapter.lora_up.weight)
    expected, actual = outputs(unet, text_encoder)[1], outputs(theirs, text_encoder)[1]
    assert difference(actual, expected) < 1e-5
    network.detach()
    assert difference(outputs(unet, text_encoder)[1], expected) > 0.02
