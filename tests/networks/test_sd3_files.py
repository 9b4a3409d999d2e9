"""Adapter files for Stable Diffusion 3: kohya's names with fused layers, diffusers' names, and that both act as
trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import (
    CAPTIONS,
    FLOW_BOUND,
    LEVELS,
    adapted,
    check_conversion,
    difference,
    flow_family,
    flow_noise,
    flow_outputs,
    load_in_diffusers,
    lora,
    lora_from_file,
    randomize,
    trained,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from networks.create import create
from networks.files import read
from networks.settings import Asked
from tests import tiny_sd3 as tiny
from tests.flow_families import FLOW
from tests.quick import slow


@pytest.fixture(scope="module")
def sd3(tiny_sd3: Path) -> Any:
    return flow_family("sd3", tiny_sd3)


def outputs_there(sd3: Any, pipeline: Any) -> tuple[Tensor, Tensor]:
    """The outputs of diffusers' pipeline: the answer and the pooled text."""
    _, tokens = FLOW["sd3"].length
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, None, max_sequence_length=tokens)
        answer = pipeline.transformer(
            hidden_states=flow_noise(sd3),
            timestep=1000 * LEVELS,
            pooled_projections=pooled,
            encoder_hidden_states=states,
        ).sample
    return answer, pooled


def everything(family: Any, file: Path, naming: str) -> tuple[Tensor, ...]:
    """As `trained`, with the embedders and the last layers as well."""
    network = lora(3, 2.0, targets=family.adapter_targets(), preset="full")
    network.naming = naming  # type: ignore[assignment]
    network.attach()
    randomize(network, 0.2)
    answer = flow_outputs(family)
    network.save(str(file), None, {})
    network.detach()
    return answer


@pytest.mark.parametrize("naming", [slow("kohya"), "diffusers"])
def test_layers_outside_of_the_blocks_too(sd3: Any, tmp_path: Path, naming: str) -> None:
    """Among them the last norm, whose rows are in another order in diffusers, and a convolution."""
    expected = everything(sd3, tmp_path / "all.safetensors", naming)
    content = read(tmp_path / "all.safetensors")
    outside = {name for name in content.layers if "joint_blocks" not in name and name.startswith("lora_unet")}
    assert outside == {
        *(f"lora_unet_{which}_embedder_mlp_{n}" for which in "ty" for n in (0, 2)),
        *("lora_unet_context_embedder", "lora_unet_x_embedder_proj"),
        *("lora_unet_final_layer_linear", "lora_unet_final_layer_adaLN_modulation_1"),
    }
    network = lora_from_file(content, targets=sd3.adapter_targets())
    network.attach()
    report = network.load(content)
    found = flow_outputs(sd3)
    network.detach()
    assert (report.missing, report.unexpected) == ((), ())
    assert all(difference(now, before) < FLOW_BOUND for now, before in zip(found, expected, strict=True))


def test_kohyas_names(sd3: Any, tmp_path: Path) -> None:
    """Of each block ten layers, two more with a second attention, seven of the last; of CLIP-L and CLIP-G six in each
    of their layers."""
    trained(sd3, flow_outputs, tmp_path / "adapter.safetensors", "kohya")
    tensors = load_file(tmp_path / "adapter.safetensors")
    modules = {key.partition(".")[0] for key in tensors}
    layers = ("attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2", "adaLN_modulation_1")
    last = tiny.BLOCKS - 1
    expected = {
        f"lora_unet_joint_blocks_{i}_{stream}_{layer}"
        for i in range(tiny.BLOCKS)
        for stream in ("x_block", "context_block")
        for layer in layers
        if not (i == last and stream == "context_block" and layer in ("attn_proj", "mlp_fc1", "mlp_fc2"))
    }
    expected |= {f"lora_unet_joint_blocks_{i}_x_block_attn2_{layer}" for i in (0, 1) for layer in ("qkv", "proj")}
    assert {name for name in modules if name.startswith("lora_unet")} == expected
    for part in ("lora_te1", "lora_te2"):
        texts = {name for name in modules if name.startswith(part)}
        assert len(texts) == 12
        assert all(name.startswith(f"{part}_text_model_encoder_layers_") for name in texts)
    fused = tensors["lora_unet_joint_blocks_0_x_block_attn2_qkv.lora_up.weight"]
    assert fused.shape == (3 * tiny.WIDTH, 9)
    # alpha / rank is the members' own
    assert tensors["lora_unet_joint_blocks_0_x_block_attn_qkv.alpha"] / 9 == pytest.approx(2 / 3)


def test_a_shared_down_is_read(sd3: Any, tmp_path: Path) -> None:
    """kohya's own files have one `down` for query, key and value, of the rank: it acts as the product that it is."""
    width = tiny.WIDTH
    generator = torch.Generator().manual_seed(2)
    down, up = (torch.randn(shape, generator=generator) / 8 for shape in ((4, width), (3 * width, 4)))
    name = "lora_unet_joint_blocks_1_context_block_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "shared.safetensors")
    content = read(tmp_path / "shared.safetensors")
    network = lora_from_file(content, targets=sd3.adapter_targets())
    network.load(content)
    found = [adapter.delta() for adapter in sorted(network.adapters, key=lambda one: one.site.place)]
    torch.testing.assert_close(torch.cat(found), up @ down * 0.5, rtol=0, atol=1e-6)


def _in_diffusers(folder: Path, file: Path, sd3: Any, caplog: Any, monkeypatch: Any) -> tuple[int, list[str], Any]:
    """A file in diffusers' own pipeline: layers that were found, its messages about LoRAs, and the outputs there."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    said = load_in_diffusers(pipeline, file, caplog, monkeypatch)
    layers = adapted(pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    return layers, said, outputs_there(sd3, pipeline)


@pytest.mark.parametrize("preset", [slow(None), "full"])
def test_diffusers_loads_every_layer_and_gives_the_same_output(
    sd3: Any, tiny_sd3: Path, tmp_path: Path, caplog: Any, monkeypatch: Any, preset: str | None
) -> None:
    """--save_naming diffusers. The rows of the last norms are in diffusers' order there."""
    make = everything if preset else lambda *given: trained(sd3, flow_outputs, *given[1:])
    expected = make(sd3, tmp_path / "adapter.safetensors", "diffusers")
    count, said, found = _in_diffusers(tiny_sd3, tmp_path / "adapter.safetensors", sd3, caplog, monkeypatch)
    assert not said
    assert count == (tiny.BLOCKS - 1) * 14 + 11 + 2 * 4 + 24 + (8 if preset else 0)
    for now, before in zip(found, expected, strict=True):
        assert difference(now, before) < FLOW_BOUND


@pytest.mark.slow
def test_diffusers_loads_nothing_of_kohyas_names(
    sd3: Any, tiny_sd3: Path, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    """Which is why the log says so, and --save_naming diffusers is there."""
    trained(sd3, flow_outputs, tmp_path / "adapter.safetensors", "kohya", "denoiser")
    base = flow_outputs(sd3)
    count, said, found = _in_diffusers(tiny_sd3, tmp_path / "adapter.safetensors", sd3, caplog, monkeypatch)
    assert count == 0
    assert any("No LoRA keys associated to" in one for one in said)
    assert all(difference(now, before) < FLOW_BOUND for now, before in zip(found, base, strict=True))


def test_conversion_exchanges_the_rows_of_the_last_norms(sd3: Any, tmp_path: Path) -> None:
    everything(sd3, tmp_path / "kohya.safetensors", "kohya")
    before, between = check_conversion(tmp_path)
    names = {
        "norm_out.linear": "final_layer_adaLN_modulation_1",
        f"transformer_blocks.{tiny.BLOCKS - 1}.norm1_context.linear": (
            f"joint_blocks_{tiny.BLOCKS - 1}_context_block_adaLN_modulation_1"
        ),
    }
    for path, name in names.items():
        up, original = between[f"transformer.{path}.lora_B.weight"], before[f"lora_unet_{name}.lora_up.weight"]
        torch.testing.assert_close(up.roll(len(up) // 2, 0), original * 2 / 3, rtol=1e-6, atol=0)
    other = between["transformer.transformer_blocks.0.norm1_context.linear.lora_B.weight"]
    kept = before["lora_unet_joint_blocks_0_context_block_adaLN_modulation_1.lora_up.weight"]
    torch.testing.assert_close(other, kept * 2 / 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model."])
def test_comfyuis_and_pefts_names_are_read(sd3: Any, tmp_path: Path, prefix: str) -> None:
    """ComfyUI has the original names behind its prefix, PEFT diffusers' names."""
    naming = "kohya" if prefix == "diffusion_model." else "diffusers"
    trained(sd3, flow_outputs, tmp_path / "adapter.safetensors", naming, "denoiser")
    if naming == "diffusers":
        renamed = {
            key.replace("transformer.", prefix, 1): tensor
            for key, tensor in load_file(tmp_path / "adapter.safetensors").items()
        }
        expected = read(tmp_path / "adapter.safetensors").tensors
    else:
        expected = read(tmp_path / "adapter.safetensors").tensors
        renamed = {}
        for key, tensor in expected.items():
            layer, _, end = key.partition(".")
            path = layer.removeprefix("lora_unet_joint_blocks_")
            number, rest = path.split("_", 1)
            for flat in ("x_block", "context_block", "attn2", "attn", "mlp", "adaLN_modulation"):
                rest = rest.replace(f"{flat}_", f"{flat}.", 1)
            rest = rest.replace("attn.2", "attn2")
            renamed[f"{prefix}joint_blocks.{number}.{rest}.{end}"] = tensor
    save_file({key: tensor.contiguous() for key, tensor in renamed.items()}, tmp_path / "other.safetensors")
    found = read(tmp_path / "other.safetensors").tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_other_kinds_with_diffusers_names_are_refused_on_the_last_norms(tmp_path: Path) -> None:
    """LoHa has no rows whose halves could be exchanged."""
    ends = {"hada_w1_a": (256, 2), "hada_w1_b": (2, 128), "hada_w2_a": (256, 2), "hada_w2_b": (2, 128)}
    tensors = {f"transformer.norm_out.linear.{end}": torch.ones(shape) for end, shape in ends.items()}
    save_file(tensors, tmp_path / "loha.safetensors")
    with pytest.raises(UserError, match="the halves of this layer's rows are exchanged in files with other names"):
        read(tmp_path / "loha.safetensors")


@pytest.mark.parametrize("kind", ["loha", slow("lokr"), slow("full"), slow("dora")])
def test_other_kinds_have_kohyas_names(sd3: Any, tmp_path: Path, kind: str) -> None:
    """And act as trained, also on the last norms, which have the original order of rows here."""
    asked = Asked() if kind == "full" else Asked(dim=2, alpha=1.0)
    network = create(kind, sd3.adapter_targets("denoiser"), asked, {})
    network.attach()
    randomize(network, 0.1)
    expected = flow_outputs(sd3)
    network.save(str(tmp_path / "other.safetensors"), None, {})
    network.detach()
    content = read(tmp_path / "other.safetensors")
    from networks.create import create_from_file

    again = create_from_file(kind, content, sd3.adapter_targets("denoiser"), Asked(), {})
    again.attach()
    again.load(content)
    found = flow_outputs(sd3)
    again.detach()
    assert all(difference(now, before) < FLOW_BOUND for now, before in zip(found, expected, strict=True))


@pytest.mark.slow
def test_merging_into_a_folder(sd3: Any, tiny_sd3: Path, tmp_path: Path) -> None:
    """A folder has diffusers' order of the last norms' rows: the merged one is diffusers' own pipeline's."""
    from diffusers import StableDiffusion3Pipeline

    from networks.tools.__main__ import main

    expected = everything(sd3, tmp_path / "adapter.safetensors", "kohya")
    words = ["merge", str(tmp_path / "adapter.safetensors"), "--base", str(tiny_sd3)]
    assert main([*words, "--save_to", str(tmp_path / "merged")]) == 0
    shutil.copytree(tiny_sd3 / "tokenizer_3", tmp_path / "merged" / "tokenizer_3", dirs_exist_ok=True)
    merged = StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for now, before in zip(outputs_there(sd3, merged), expected, strict=True):
        assert difference(now, before) < FLOW_BOUND
