"""Files for SDXL: diffusers takes every tensor and acts as the network did; every naming is read."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import difference, lora, lora_from_file, randomize, sd_targets, sdxl_outputs
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.files.hashes import safetensors_hashes
from library.files.header import read_metadata
from networks.files import read
from networks.merge import BaseWeights
from networks.tools.__main__ import main as tools
from tests.merging import merge_into
from tests.quick import slow

# Largest difference of an output, relative to the largest output, in fp32: the order of multiplications differs
BOUND = 1e-5


def trained(family: Any, file: Path, *, conv_dim: int | None = None) -> tuple[torch.Tensor, ...]:
    """What the model answers with a network that is saved to `file`, and taken off again."""
    network = lora(4, 3.0, targets=family.adapter_targets(), conv_dim=conv_dim, conv_alpha=0.5)
    network.attach()
    randomize(network, 0.2)
    answer = sdxl_outputs(family)
    network.save(str(file), None, {"ss_network_module": "networks.lora"})
    network.detach()
    return answer


def acts(family: Any, file: Path) -> tuple[torch.Tensor, ...]:
    """The same with the network that a file says, all of which must fit."""
    content = read(file)
    network = lora_from_file(content, targets=family.adapter_targets())
    network.attach()
    report = network.load(content)
    assert (report.missing, report.unexpected) == ((), ())
    answer = sdxl_outputs(family)
    network.detach()
    return answer


def take_parts(family: Any, pipeline: Any) -> None:
    """Have the family compute with the parts of one of diffusers' pipelines."""
    for name, kind in family.PARTS.items():
        family.components[name] = getattr(pipeline, kind.folder)


def with_diffusers_blocks(tensors: dict[str, torch.Tensor], family: Any) -> dict[str, torch.Tensor]:
    """The same file as other trainers write it: the UNet's layers by diffusers' names."""
    unet = family.adapter_targets()[0]
    paths = [path for path, _ in unet.root.named_modules() if unet.linear.fullmatch(path) or unet.conv.fullmatch(path)]
    names = {f"lora_unet_{unet.name(path)}".replace(".", "_"): f"lora_unet_{path}".replace(".", "_") for path in paths}
    return {
        names.get(key.partition(".")[0], key.partition(".")[0]) + key[key.index(".") :]: t for key, t in tensors.items()
    }


@pytest.mark.parametrize(("conv_dim", "modules"), [slow((None, 228)), (2, 293)])
def test_diffusers_takes_every_tensor_and_gives_the_same_output(
    sdxl, tiny_sdxl, conv_dim, modules, tmp_path, caplog, monkeypatch
):
    from diffusers import StableDiffusionXLPipeline

    base = sdxl_outputs(sdxl)
    expected = trained(sdxl, tmp_path / "adapter.safetensors", conv_dim=conv_dim)
    assert all(difference(with_adapter, without) > 0.02 for with_adapter, without in zip(expected, base, strict=True))
    assert all(torch.equal(now, before) for now, before in zip(sdxl_outputs(sdxl), base, strict=True))

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32, add_watermarker=False)
    for library in ("diffusers", "transformers", "peft"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    assert not [
        record for record in caplog.records if record.name.split(".")[0] in ("diffusers", "transformers", "peft")
    ]
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    assert sum("lora_A" in name for part in parts for name, _ in part.named_parameters()) == modules
    take_parts(sdxl, pipeline)
    for actual, wanted in zip(sdxl_outputs(sdxl), expected, strict=True):
        assert difference(actual, wanted) < BOUND


def test_a_file_with_diffusers_names_of_blocks_acts_the_same(sdxl, tmp_path):
    expected = trained(sdxl, tmp_path / "own.safetensors", conv_dim=2)
    own = load_file(tmp_path / "own.safetensors")
    other = with_diffusers_blocks(own, sdxl)
    assert any(key.startswith("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.") for key in other)
    assert len(other) == len(own)
    assert not any("input_blocks" in key for key in other)
    save_file(other, tmp_path / "other.safetensors")
    for file in ("own.safetensors", "other.safetensors"):
        for actual, wanted in zip(acts(sdxl, tmp_path / file), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_either_naming_can_be_merged_into_the_base(sdxl, tmp_path, caplog):
    expected = trained(sdxl, tmp_path / "own.safetensors", conv_dim=2)
    save_file(with_diffusers_blocks(load_file(tmp_path / "own.safetensors"), sdxl), tmp_path / "other.safetensors")
    merged = BaseWeights([str(tmp_path / "other.safetensors")], [])
    with caplog.at_level(logging.INFO):
        merge_into(merged, sdxl.adapter_targets())
        merged.report()
    assert "293 of 293 modules" in caplog.text
    for actual, wanted in zip(sdxl_outputs(sdxl), expected, strict=True):
        assert difference(actual, wanted) < BOUND


def test_a_file_of_diffusers_own_acts_as_there(sdxl, tiny_sdxl, tmp_path):
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32, add_watermarker=False)
    unet = ["to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "downsamplers.0.conv"]
    layers = {"unet": unet, "text_encoder": ["q_proj", "fc1"], "text_encoder_2": ["out_proj", "fc2"]}
    states = {}
    for part, wanted in layers.items():
        model = getattr(pipeline, part)
        torch.manual_seed(3)
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=wanted, init_lora_weights=False))
        states[part] = get_peft_model_state_dict(model)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        text_encoder_2_lora_layers=states["text_encoder_2"],
    )
    answer = acts(sdxl, tmp_path / "pytorch_lora_weights.safetensors")
    take_parts(sdxl, pipeline)
    for actual, wanted in zip(answer, sdxl_outputs(sdxl), strict=True):
        assert difference(actual, wanted) < BOUND


OF_THE_OLD_FILE = {"sshs_model_hash": "0x12", "sshs_legacy_hash": "34", "modelspec.hash_sha256": "0x56"}


@pytest.mark.slow
def test_there_and_back(sdxl, tiny, tmp_path):
    """kohya → diffusers → kohya, at every kind of layer of SDXL and of Stable Diffusion 1.x; by the command as well."""
    for targets, name in ((sdxl.adapter_targets(), "xl"), (sd_targets(*tiny), "sd")):
        network = lora(4, 2.0, targets=targets, conv_dim=2)
        randomize(network)
        own, there, back = (tmp_path / f"{name}-{which}.safetensors" for which in ("own", "there", "back"))
        network.save(str(own), torch.float16, {"ss_steps": "7", **OF_THE_OLD_FILE})
        assert tools(["convert", str(own), str(there), "--to", "diffusers"]) == 0
        assert tools(["convert", str(there), str(back), "--to", "kohya"]) == 0
        before, after = load_file(own), load_file(back)
        assert after.keys() == before.keys()
        assert len(load_file(there)) == 2 * len(before) // 3
        assert all(key.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for key in load_file(there))
        for key, tensor in before.items():
            if key.endswith("lora_up.weight"):  # 2 / 4 went into it, or 1 / 2, and alpha is the rank now
                tensor = tensor / 2
            if key.endswith(".alpha"):
                tensor = tensor * 2
            assert torch.equal(after[key], tensor), key
        for file in (there, back):
            metadata = read_metadata(file)
            of_names = {"lora_adapter_metadata"} if file == there else set()  # the alphas, for diffusers
            assert metadata.keys() == {"ss_steps", "sshs_model_hash", "sshs_legacy_hash"} | of_names
            assert metadata["ss_steps"] == "7"
            content = file.read_bytes()
            data = content[8 + int.from_bytes(content[:8], "little") :]
            assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
            metadata.pop("lora_adapter_metadata", None)
            assert metadata == {"ss_steps": "7", **safetensors_hashes(file)}


def test_diffusers_takes_what_was_converted(sdxl, tiny_sdxl, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    expected = trained(sdxl, tmp_path / "own.safetensors", conv_dim=2)
    assert (
        tools(["convert", str(tmp_path / "own.safetensors"), str(tmp_path / "there.safetensors"), "--to", "diffusers"])
        == 0
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32, add_watermarker=False)
    pipeline.load_lora_weights(str(tmp_path), weight_name="there.safetensors")
    take_parts(sdxl, pipeline)
    for actual, wanted in zip(sdxl_outputs(sdxl), expected, strict=True):
        assert difference(actual, wanted) < BOUND


def test_what_cannot_be_converted_is_named(tmp_path, capsys):
    source, target = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    for key, said in (
        ("lora_unet_x.lambda_layer", "is a T-LoRA, which no kind of adapter here reads"),
        ("lora_te_x.alpha", "no known kind, such as lora_te"),
    ):
        save_file({key: torch.ones(2)}, source)
        assert tools(["convert", str(source), str(target), "--to", "diffusers"]) == 2
        assert said in capsys.readouterr().err
    assert tools(["convert", str(source), str(source), "--to", "kohya"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_without_the_second_encoder_the_first_is_still_the_first(sdxl, tmp_path):
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    unet = "unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_q"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    pairs = {f"{name}.lora_{x}.weight": t.clone() for name in (unet, text) for x, t in (("A", down), ("B", up))}
    save_file(pairs, tmp_path / "x.safetensors")
    assert {key.partition(".")[0] for key in read(tmp_path / "x.safetensors").tensors} == {
        "lora_unet_middle_block_1_transformer_blocks_1_attn1_to_q",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    }
    acts(sdxl, tmp_path / "x.safetensors")


def test_a_file_for_stable_diffusion_does_not_fit(sdxl, tiny, tmp_path):
    network = lora(4, 1.0, targets=sd_targets(*tiny))
    own = {key: tensor for key, tensor in network.state_dict().items() if key.startswith("lora_te")}
    save_file(own, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match=r"sd\.safetensors: none of its \d+ modules, such as lora_te_text_model"):
        acts(sdxl, tmp_path / "sd.safetensors")


def test_lycoris_sees_kohyas_names_and_takes_effect(sdxl):
    lycoris = pytest.importorskip("lycoris.kohya")
    encoders, unet = sdxl.third_party_views()
    network = lycoris.create_network(
        1.0, 4, 1, None, encoders, unet, algo="locon", preset="full", conv_dim=2, conv_alpha=1
    )
    names = {module.lora_name for module in [*network.text_encoder_loras, *network.unet_loras]}
    ours = lora(4, 1.0, targets=sdxl.adapter_targets(), conv_dim=2)
    assert names == {adapter.site.name for adapter in ours.adapters}
    before = sdxl_outputs(sdxl)
    network.apply_to(encoders, unet, True, True)
    randomize(network, 0.2)
    assert all(difference(now, was) > 0.02 for now, was in zip(sdxl_outputs(sdxl), before, strict=True))
