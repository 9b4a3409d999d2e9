"""The names and shapes in files, at true size, against kohya's own and against the rules of what loads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from adapter_models import lora

from library.models.checkpoints.base_model import ASSETS
from library.models.checkpoints.checkpoint import original_unet_name
from library.models.modules import new_unet

GOLDEN = Path(__file__).parent / "golden"
RANK, CONV_RANK = 4, 2


def golden_shapes(base: str, *, conv: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of kohya's file.

    golden/*.txt was written by running sd-scripts 0.10 itself: its `networks.lora.create_network`, without and with
    conv_dim, on its own `UNet2DConditionModel` or `SdxlUNet2DConditionModel` (meta device) and on transformers'
    CLIPTextModel below a `text_model`.
    A line: name, kind, inputs, outputs, "network" or "conv" (there with conv_dim only), the option that sets its rank.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for line in (GOLDEN / f"{base}_modules.txt").read_text().splitlines():
        name, kind, inputs, outputs, where, option = line.split()
        if where == "conv" and not conv:
            continue
        rank = {"network_dim": RANK, "conv_dim": CONV_RANK}[option]
        kernel = tuple(map(int, kind.removeprefix("conv").split("x"))) if kind != "linear" else ()
        shapes[f"{name}.lora_down.weight"] = (rank, int(inputs), *kernel)
        shapes[f"{name}.lora_up.weight"] = (int(outputs), rank, *(1 for _ in kernel))
        shapes[f"{name}.alpha"] = ()
    return shapes


@pytest.mark.parametrize(
    ("base", "conv", "counts"),
    [
        ("sd15", False, {"text_encoder": 72, "unet": 192}),
        ("sd15", True, {"text_encoder": 72, "unet": 278}),
        ("sd2", False, {"text_encoder": 138, "unet": 192}),
        ("sd2", True, {"text_encoder": 138, "unet": 278}),
        ("sdxl", False, {"text_encoder_1": 72, "text_encoder_2": 192, "unet": 722}),
        ("sdxl", True, {"text_encoder_1": 72, "text_encoder_2": 192, "unet": 788}),
    ],
)
def test_a_file_has_exactly_the_tensors_of_kohya(true_sizes, base, conv, counts):
    network = lora(RANK, 1.0, targets=true_sizes[base], conv_dim=CONV_RANK if conv else None)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes == golden_shapes(base, conv=conv)
    assert network.counts() == counts
    assert len(shapes) == 3 * sum(counts.values())
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}


def modules_of(true_sizes, base: str) -> list[str]:
    network = lora(1, 1.0, targets=true_sizes[base], conv_dim=1)
    return [adapter.site.name for adapter in network.adapters]


def comfy_names(layers: int) -> set[str]:
    """What ComfyUI's `model_lora_keys_unet` and `model_lora_keys_clip` (comfy/lora.py) accept for SD 1 and 2.

    UNet: "lora_unet_" and the diffusers name of a weight, dots as underscores. Text: a fixed map of six layers.
    """
    resnet = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
    block = [f"attn{i}_to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    attention = ("proj_in", "proj_out", *(f"transformer_blocks_0_{layer}" for layer in block))
    places = {"mid_block": 2} | {f"down_blocks_{i}": 2 for i in range(4)} | {f"up_blocks_{i}": 3 for i in range(4)}
    unet = {f"{place}_resnets_{j}_{layer}" for place, count in places.items() for j in range(count) for layer in resnet}
    unet |= {f"{place}_attentions_{j}_{layer}" for place, n in places.items() for j in range(n) for layer in attention}
    unet |= {f"down_blocks_{i}_downsamplers_0_conv" for i in range(3)}
    unet |= {f"up_blocks_{i}_upsamplers_0_conv" for i in range(3)}
    text = [f"self_attn_{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    clip = {f"lora_te_text_model_encoder_layers_{i}_{layer}" for i in range(layers) for layer in text}
    return {f"lora_unet_{name}" for name in unet} | clip


def test_comfyui_and_a1111_know_every_name_of_sdxl(true_sizes):
    """Both take the original layout's names as they are, dots as underscores, and transformers' of the text encoders.

    A1111: extensions-builtin/Lora/networks.py; ComfyUI: comfy/lora.py, `model_lora_keys_unet`.
    """
    config = json.loads((ASSETS / "sdxl.json").read_text())
    unet = {path.rpartition(".")[0] for path, _ in new_unet(config["unet"]).named_parameters()}
    original = {f"lora_unet_{original_unet_name(path, layers_per_block=2)}".replace(".", "_") for path in unet}
    names = modules_of(true_sizes, "sdxl")
    assert {name for name in names if name.startswith("lora_unet_")} <= original
    layer = r"(self_attn_(q|k|v|out)_proj|mlp_fc[12])"
    for name in names:
        if not name.startswith("lora_unet_"):
            assert re.fullmatch(rf"lora_te[12]_text_model_encoder_layers_\d+_{layer}", name), name


@pytest.mark.parametrize(("base", "layers"), [("sd15", 12), ("sd2", 23)])
def test_comfyui_knows_every_name(true_sizes, base, layers):
    assert set(modules_of(true_sizes, base)) <= comfy_names(layers)


def a1111_name(name: str, *, sd2: bool) -> str:
    """A1111's `convert_diffusers_name_to_compvis` (extensions-builtin/Lora/networks.py), restated for what we write."""
    attention, resnet = {"attentions": 1, "resnets": 0}, {"conv1": "in_layers_2", "conv2": "out_layers_3"}
    resnet |= {"time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection"}
    if found := re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d)_(.+)", name):
        kind, i, rest = found.groups()
        place = 1 if kind == "attentions" else int(i) * 2
        return f"diffusion_model_middle_block_{place}_{resnet.get(rest, rest)}"
    if found := re.fullmatch(r"lora_unet_(down|up)_blocks_(\d)_(attentions|resnets)_(\d)_(.+)", name):
        way, i, kind, j, rest = found.groups()
        side, number = ("input", 1 + int(i) * 3 + int(j)) if way == "down" else ("output", int(i) * 3 + int(j))
        return f"diffusion_model_{side}_blocks_{number}_{attention[kind]}_{resnet.get(rest, rest)}"
    if found := re.fullmatch(r"lora_unet_down_blocks_(\d)_downsamplers_0_conv", name):
        return f"diffusion_model_input_blocks_{3 + int(found[1]) * 3}_0_op"
    if found := re.fullmatch(r"lora_unet_up_blocks_(\d)_upsamplers_0_conv", name):
        return f"diffusion_model_output_blocks_{2 + int(found[1]) * 3}_{2 if int(found[1]) > 0 else 1}_conv"
    found = re.fullmatch(r"lora_te_text_model_encoder_layers_(\d+)_(.+)", name)
    assert found, f"{name} follows none of the rules"
    number, rest = found.groups()
    if not sd2:
        return f"transformer_text_model_encoder_layers_{number}_{rest}"
    rest = rest.replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")
    return f"model_transformer_resblocks_{number}_{rest}"


def compvis_unet_names() -> set[str]:
    """The adaptable layers of the original UNet of SD 1 and 2 (ldm/modules/diffusionmodules/openaimodel.py)."""
    block = [f"attn{i}_to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    attention = ("proj_in", "proj_out", *(f"transformer_blocks_0_{layer}" for layer in block))
    names = set()

    def add(place: str, *, skip: bool) -> None:
        names.update(f"{place}_{layer}" for layer in ("in_layers_2", "emb_layers_1", "out_layers_3"))
        names.update([f"{place}_skip_connection"] if skip else [])

    for i in (1, 2, 4, 5, 7, 8, 10, 11):
        add(f"input_blocks_{i}_0", skip=i in (4, 7))
    for i in range(12):
        add(f"output_blocks_{i}_0", skip=True)
    for i in (0, 2):
        add(f"middle_block_{i}", skip=False)
    for place in ("middle_block_1", *(f"input_blocks_{i}_1" for i in (1, 2, 4, 5, 7, 8))):
        names.update(f"{place}_{layer}" for layer in attention)
    for i in range(3, 12):
        names.update(f"output_blocks_{i}_1_{layer}" for layer in attention)
    names.update(f"input_blocks_{i}_0_op" for i in (3, 6, 9))
    names.update(("output_blocks_2_1_conv", "output_blocks_5_2_conv", "output_blocks_8_2_conv"))
    return {f"diffusion_model_{name}" for name in names}


@pytest.mark.parametrize("base", ["sd15", "sd2"])
def test_a1111_finds_a_layer_of_its_own_for_every_name(true_sizes, base):
    modules = modules_of(true_sizes, base)
    mapped = [a1111_name(name, sd2=base == "sd2") for name in modules]
    assert len(set(mapped)) == len(modules)
    assert {name for name in mapped if name.startswith("diffusion_model_")} == compvis_unet_names()
