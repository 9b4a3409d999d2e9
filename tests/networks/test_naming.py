"""Files as diffusers and PEFT write them, old and new: loaded, they act as they did where they were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_models import difference, lora, lora_from_file, outputs, randomize, sd_targets
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.checkpoints.adapter_file import naming_of
from networks.files import read
from networks.formats.naming import to_kohya

# Largest difference of an output, relative to the largest output, in fp32: the order of multiplications differs
BOUND = 1e-5
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "encoder.layers.0.self_attn"


def attach(file: Path, unet, text_encoder):
    """The network of a file, attached, with all that the file says."""
    content = read(file)
    network = lora_from_file(content, targets=sd_targets(unet, text_encoder))
    network.attach()
    report = network.load(content)
    assert (report.missing, report.unexpected) == ((), ())
    return network


UNET_LAYERS = ["to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut"]
TEXT_LAYERS = ["q_proj", "out_proj", "fc1"]


def peft_config(targets, *, rslora: bool = False):
    from peft import LoraConfig

    ranks, alphas = ({k: v for k, v in p.items() if k in targets} for p in ({"to_q": 2}, {"to_q": 5, "q_proj": 1}))
    return LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, init_lora_weights=False,
        rank_pattern=ranks, alpha_pattern=alphas,
    )  # fmt: skip


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_file_of_peft_acts_as_there(tiny, tmp_path, part, rslora):
    from peft import get_peft_model

    unet, text_encoder = tiny
    model = get_peft_model(
        unet if part == "unet" else text_encoder,
        peft_config(UNET_LAYERS if part == "unet" else TEXT_LAYERS, rslora=rslora),
    )
    expected = outputs(*((model, text_encoder) if part == "unet" else (unet, model)))
    model.save_pretrained(tmp_path)
    model.unload()
    file = tmp_path / "adapter_model.safetensors"
    assert naming_of(load_file(file)) == "PEFT"
    base = outputs(unet, text_encoder)
    network = attach(file, unet, text_encoder)
    assert network.counts().keys() == {part}
    assert sum(network.counts().values()) > 5
    for actual, wanted, without in zip(outputs(unet, text_encoder), expected, base, strict=True):
        assert difference(actual, wanted) < BOUND
        if part == "text_encoder":
            assert difference(without, wanted) > 0.01


def test_a_file_of_peft_whose_start_was_taken_out_of_the_base_is_refused(tmp_path):
    """It would act on the untouched base as nobody trained it."""
    file, layer = tmp_path / "adapter_model.safetensors", "base_model.model.mid_block.attentions.0.proj_in"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(4, 2)}, file)
    config = {"r": 2, "lora_alpha": 2, "init_lora_weights": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert len(read(file).layers) == 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(UserError, match="with init_lora_weights pissa_niter_4 PEFT took the first values"):
        read(file)


@pytest.mark.parametrize("metadata", [True, False], ids=["alpha", "without alpha"])
def test_a_file_of_diffusers_acts_as_there(tiny, tmp_path, metadata):
    """Written by diffusers' own `save_lora_weights`, as its training scripts do it."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    unet, text_encoder = tiny
    base = outputs(unet, text_encoder)
    config, text_config = peft_config(UNET_LAYERS), peft_config(TEXT_LAYERS)
    if not metadata:  # then diffusers takes alpha for the rank
        for one in (config, text_config):
            one.lora_alpha, one.alpha_pattern = one.r, dict(one.rank_pattern)
    unet.add_adapter(config)
    text_encoder.add_adapter(text_config)
    expected = outputs(unet, text_encoder)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(text_encoder)),
        **(_collate_lora_metadata({"unet": unet, "text_encoder": text_encoder}) if metadata else {}),
    )
    unet.disable_adapters()
    text_encoder.disable_adapters()
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    assert naming_of(tensors) == "diffusers"
    converted = read(file).tensors
    assert len(converted) == len(tensors) * 3 // 2
    assert (converted[f"lora_unet_{ATTENTION.replace('.', '_')}_to_q.alpha"] == 5) == metadata

    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from tests.conftest import BASE

    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", dtype=torch.float32).eval()
    text_encoder = CLIPTextModel.from_pretrained(BASE, subfolder="text_encoder", dtype=torch.float32).eval()
    network = attach(file, unet, text_encoder)
    assert network.counts().keys() == {"text_encoder", "unet"}
    for actual, wanted, without in zip(outputs(unet, text_encoder), expected, base, strict=True):
        assert difference(actual, wanted) < BOUND
        assert difference(without, wanted) > 0.01


PAIR = {"down": torch.ones(2, 8), "up": torch.ones(6, 2)}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"unet.{ATTENTION}.processor.to_q_lora.%s.weight", "unet_{A}_to_q"),
        (f"{ATTENTION}.processor.to_out_lora.%s.weight", "unet_{A}_to_out_0"),
        (f"unet.{ATTENTION}.to_out.0.lora.%s.weight", "unet_{A}_to_out_0"),
        (f"text_encoder.text_model.{TEXT}.to_q_lora.%s.weight", "te_text_model_{T}_q_proj"),
        (f"text_encoder.text_model.{TEXT}.to_out_lora.%s.weight", "te_text_model_{T}_out_proj"),
        (f"text_encoder.{TEXT}.k_proj.lora_linear_layer.%s.weight", "te_text_model_{T}_k_proj"),
        (f"text_encoder.text_model.{TEXT}.k_proj.lora_linear_layer.%s.weight", "te_text_model_{T}_k_proj"),
        (f"unet.base_model.model.{ATTENTION}.to_k.lora_{{}}.weight", "unet_{A}_to_k"),
        (f"base_model.model.{ATTENTION}.to_k.lora_{{}}.default.weight", "unet_{A}_to_k"),
        (f"base_model.model.text_model.{TEXT}.v_proj.lora_{{}}.weight", "te_text_model_{T}_v_proj"),
    ],
)
def test_every_way_to_name_a_layer_is_read(key, name):
    tensors = {
        (key % kind if "%s" in key else key.format({"down": "A", "up": "B"}[kind])): tensor
        for kind, tensor in PAIR.items()
    }
    name = "lora_" + name.format(A=ATTENTION.replace(".", "_"), T=TEXT.replace(".", "_"))
    converted = to_kohya(tensors, source="file")
    assert converted.keys() == {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"}
    assert converted[f"{name}.lora_down.weight"] is PAIR["down"]
    assert converted[f"{name}.alpha"].item() == 2


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            f"unet.{ATTENTION}.to_q.lora_B.bias",
            "is a LoRA with biases: unet.*lora_B.bias: no kind of adapter here has a bias",
        ),
        (f"unet.{ATTENTION}.to_q.gate", "1 tensors of no known kind, such as unet.*gate, which no kind of adapter"),
        ("transformer.blocks.0.attn.lora_A.weight", "neither a UNet's layer nor a text encoder's"),
        (f"unet.{ATTENTION}.to_v.lora_B.weight", "to_v has a lora_up.weight and no lora_down.weight"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, key, said):
    pair = {f"unet.{ATTENTION}.to_q.lora_{x}.weight": t for x, t in zip("AB", PAIR.values(), strict=True)}
    save_file(pair | {key: torch.ones(6)}, tmp_path / "f.safetensors")
    with pytest.raises(UserError, match=f"f.safetensors.*{said}"):
        read(tmp_path / "f.safetensors", purpose="is merged")


def test_a_configuration_that_is_broken_is_named(tmp_path):
    pair = {f"base_model.model.{ATTENTION}.to_q.lora_{x}.weight": t for x, t in zip("AB", PAIR.values(), strict=True)}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    for text, said in (("{", "not valid JSON"), ("[]", "table"), (json.dumps({"lora_alpha": "x"}), "cannot be read")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=said):
            read(tmp_path / "adapter_model.safetensors")


def test_kohyas_own_names_stay_as_they_are(tiny, tmp_path):

    network = lora(4, 2.0, targets=sd_targets(*tiny))
    randomize(network)
    network.save(str(tmp_path / "own.safetensors"), None, None)
    assert naming_of(network.state_dict()) == "kohya"
    assert read(tmp_path / "own.safetensors").tensors.keys() == network.state_dict().keys()
    assert naming_of({"model.diffusion_model.x": 1}) is None
