"""Files of OneTrainer and ComfyUI, at true size: every layer gets the name that kohya's file has for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import difference, lora, lora_from_file, outputs, randomize, sd_targets
from safetensors.torch import load_file, save_file

from library.models.checkpoints.adapter_file import naming_of
from networks.files import read
from networks.formats.naming import to_kohya
from networks.merge import BaseWeights
from networks.network import Network
from networks.sites import in_names_of
from networks.tools.__main__ import main as tools
from tests.quick import quick

sys.path.append(str(Path(__file__).parents[1] / "models"))
from original_layout import unet_name

from tests.merging import merge_into

ATTENTION_UP = {"sd15": (False, True, True, True), "sd2": (False, True, True, True), "sdxl": (True, True, False)}
ENCODERS = {
    "legacy": {"sd15": ("lora_te",), "sd2": ("lora_te",), "sdxl": ("lora_te1", "lora_te2")},
    "new": {"sd15": ("clip_l",), "sd2": ("clip_l",), "sdxl": ("clip_l", "clip_g")},
    "comfyui": {
        "sd15": ("text_encoders.clip_l.transformer",), "sd2": ("text_encoders.clip_h.transformer",),
        "sdxl": ("text_encoders.clip_l.transformer", "text_encoders.clip_g.transformer"),
    },
}  # fmt: skip


def _original(path: str, base: str) -> str:
    return unet_name(f"{path}.weight", layers=2, attention_up=ATTENTION_UP[base]).removesuffix(".weight")


UNETS: dict[str, Callable[[str, str], str]] = {
    "legacy": lambda path, _base: f"lora_unet.{path}",
    "new": lambda path, base: f"unet.{_original(path, base)}",
    "comfyui": lambda path, base: f"diffusion_model.{_original(path, base)}",
}


def renamed(network: Network, targets: Any, style: str, base: str) -> dict[str, torch.Tensor]:
    """The network's tensors as such a program writes them."""
    unet = targets[0]
    adapted = [
        path for path, _ in unet.root.named_modules() if unet.linear.fullmatch(path) or unet.conv.fullmatch(path)
    ]
    paths = {unet.name(path): path for path in adapted}  # kohya has the original names for SDXL
    sections = [name for name in network.sections() if name != "unet"]
    encoders = dict(zip(sections, ENCODERS[style][base], strict=True))
    tensors = {}
    for section, adapters in network.sections().items():
        for adapter in adapters:
            path = adapter.site.path
            if section == "unet":
                name = UNETS[style](paths[path], base)
            else:
                name = f"{encoders[section]}.text_model.{path.removeprefix('text_model.')}"
            tensors |= {f"{name}.{end}": tensor for end, tensor in adapter.state_dict().items()}
    return tensors


@pytest.mark.parametrize("style", UNETS)
@pytest.mark.parametrize("base", quick(["sd15", "sd2", "sdxl"], "sd15"))
def test_every_layer_gets_kohyas_name(true_sizes: Any, base: str, style: str) -> None:
    network = lora(2, 1.0, targets=true_sizes[base], conv_dim=2)
    tensors = renamed(network, true_sizes[base], style, base)
    assert naming_of(tensors) == ("ComfyUI" if style == "comfyui" else "OneTrainer")
    converted = in_names_of((adapter.site for adapter in network.adapters), to_kohya(tensors, source="x"))
    own = network.state_dict()
    assert converted.keys() == own.keys()
    assert all(converted[name].shape == own[name].shape for name in own)


@pytest.mark.parametrize("style", quick(UNETS, "new"))
def test_they_act_as_kohyas(tiny: Any, tmp_path: Path, style: str, caplog: Any) -> None:
    network = lora(4, 3.0, targets=sd_targets(*tiny), conv_dim=2, conv_alpha=0.5)
    network.attach()
    randomize(network, 0.2)
    expected = outputs(*tiny)
    tensors = {
        name: tensor.detach().clone() for name, tensor in renamed(network, sd_targets(*tiny), style, "sd15").items()
    }
    network.detach()
    if style == "comfyui":  # its own files have no alpha: the scale is in the weights
        for name in [name for name in tensors if name.endswith(".alpha")]:
            up = name.replace(".alpha", ".lora_up.weight")
            tensors[up] *= tensors.pop(name) / tensors[up].shape[1]
    file = tmp_path / "x.safetensors"
    save_file({**tensors, "bundle_emb.a word.clip_l": torch.ones(2, 4)}, file)

    other = lora_from_file(str(file), targets=sd_targets(*tiny))
    other.attach()
    report = other.load(read(file))
    assert (report.missing, report.unexpected) == ((), ())
    assert caplog.text.count("textual inversion embeddings beside the LoRA are left out: a word") == 2
    assert all(difference(actual, wanted) < 1e-6 for actual, wanted in zip(outputs(*tiny), expected, strict=True))
    other.detach()

    merged = BaseWeights([str(file)], [])
    merge_into(merged, sd_targets(*tiny))
    merged.report()
    assert all(difference(actual, wanted) < 5e-5 for actual, wanted in zip(outputs(*tiny), expected, strict=True))


def test_embeddings_stay_in_a_file_of_kohyas_names_and_leave_one_of_diffusers(tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "x.safetensors"
    name = "unet.middle_block.1.transformer_blocks.0.attn1.to_q"
    pair = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(6, 2)}
    save_file({**pair, "bundle_emb.fox.emb_params": torch.ones(2, 8)}, source)
    assert tools(["convert", str(source), str(tmp_path / "k.safetensors"), "--to", "kohya"]) == 0
    assert "left out" not in capsys.readouterr().err
    assert tools(["convert", str(source), str(tmp_path / "d.safetensors"), "--to", "diffusers"]) == 0
    assert "textual inversion embeddings beside the LoRA are left out: fox" in capsys.readouterr().err
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    assert load_file(tmp_path / "k.safetensors").keys() == {
        "bundle_emb.fox.emb_params", *(f"{layer}.{end}" for end in ends)
    }  # fmt: skip
    assert len(load_file(tmp_path / "d.safetensors")) == 2


def test_the_projection_that_onetrainer_adapts_is_no_layer_of_the_text_model(tmp_path: Path) -> None:
    tensors = {f"clip_g.text_projection.lora_{end}.weight": torch.ones(2, 2) for end in ("down", "up")}
    save_file(tensors, tmp_path / "x.safetensors")
    assert {name.partition(".")[0] for name in read(tmp_path / "x.safetensors").tensors} == {"lora_te2_text_projection"}
