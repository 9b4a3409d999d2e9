"""Diffusers folders rewritten as single files in the original layout: the opposite way of
library.models.checkpoints.checkpoint, written apart from it, so that each checks the other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from library.models.checkpoints.base_model import ASSETS

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def unet_name(name: str, *, layers: int, attention_up: Sequence[bool]) -> str:
    """The original name of a diffusers UNet's weight; `attention_up`: which up blocks have attention."""
    words = name.split(".")
    head, tail = words[0], words[-1]
    embeddings = {"time_embedding": "time_embed", "add_embedding": "label_emb.0"}
    if head in embeddings:
        return f"{embeddings[head]}.{ {'linear_1': 0, 'linear_2': 2}[words[1]] }.{tail}"
    fixed = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    if head in fixed:
        return f"{fixed[head]}.{tail}"
    if head == "mid_block":
        kind, which, rest = words[1], int(words[2]), words[3:]
        place = 1 if kind == "attentions" else 2 * which
        return f"middle_block.{place}.{_rest(kind, rest)}"
    block, kind, which, rest = int(words[1]), words[2], int(words[3]), words[4:]
    if head == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{tail}"
        return f"input_blocks.{1 + block * (layers + 1) + which}.{int(kind == 'attentions')}.{_rest(kind, rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if attention_up[block] else 1}.conv.{tail}"
    return f"output_blocks.{block * (layers + 1) + which}.{int(kind == 'attentions')}.{_rest(kind, rest)}"


def _rest(kind: str, words: list[str]) -> str:
    return ".".join([_RESNET[words[0]], *words[1:]] if kind == "resnets" else words)


def vae_name(name: str, *, blocks: int) -> str:
    """The original name of a diffusers VAE's weight; `blocks`: up blocks of the decoder."""
    words = name.split(".")
    if words[0] in ("quant_conv", "post_quant_conv"):
        return name
    if words[1] == "conv_norm_out":
        return f"{words[0]}.norm_out.{words[-1]}"
    if words[1] == "mid_block" and words[2] == "resnets":
        return ".".join([words[0], "mid", f"block_{int(words[3]) + 1}", *words[4:]])
    if words[1] == "mid_block":
        inner = ".".join(words[4:-1])
        original = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}[inner]
        return f"{words[0]}.mid.attn_1.{original}.{words[-1]}"
    if words[1] in ("down_blocks", "up_blocks"):
        side = words[1].removesuffix("_blocks")
        block = int(words[2]) if side == "down" else blocks - 1 - int(words[2])
        if words[3] == "resnets":
            inner = ".".join(words[5:]).replace("conv_shortcut", "nin_shortcut")
            return f"{words[0]}.{side}.{block}.block.{words[4]}.{inner}"
        return f"{words[0]}.{side}.{block}.{side}sample.{'.'.join(words[5:])}"
    return name


def open_clip_layout(states: Mapping[str, torch.Tensor], *, layers: int) -> dict[str, torch.Tensor]:
    """A CLIPTextModel's weights as open_clip names them, with one further, unused layer and the projection."""
    width = states["final_layer_norm.weight"].shape[0]
    out = {
        "positional_embedding": states["embeddings.position_embedding.weight"],
        "token_embedding.weight": states["embeddings.token_embedding.weight"],
        "ln_final.weight": states["final_layer_norm.weight"],
        "ln_final.bias": states["final_layer_norm.bias"],
        "text_projection": torch.full((width, width), 7.0),
        "logit_scale": torch.tensor(4.6),
    }
    for layer in range(layers):
        here, there = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            qkv = [states[f"{here}.self_attn.{which}_proj.{kind}"] for which in "qkv"]
            out[f"{there}.attn.in_proj_{kind}"] = torch.cat(qkv)
            out[f"{there}.attn.out_proj.{kind}"] = states[f"{here}.self_attn.out_proj.{kind}"]
            for ours, theirs in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")):
                out[f"{there}.{theirs}.{kind}"] = states[f"{here}.{ours}.{kind}"]
            out[f"{there}.mlp.c_fc.{kind}"] = states[f"{here}.mlp.fc1.{kind}"]
            out[f"{there}.mlp.c_proj.{kind}"] = states[f"{here}.mlp.fc2.{kind}"]
    last = f"transformer.resblocks.{layers - 1}."
    unused = {n.replace(f".{layers - 1}.", f".{layers}."): t + 1 for n, t in out.items() if n.startswith(last)}
    return out | unused


def single_file(
    unet: Mapping[str, torch.Tensor],
    vae: Mapping[str, torch.Tensor],
    text: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    open_clip: bool = False,
) -> dict[str, torch.Tensor]:
    """A whole checkpoint from the parts' weights (under today's names) and configurations."""
    layers = config["unet"]["layers_per_block"]
    up = ["CrossAttn" in kind for kind in config["unet"]["up_block_types"]]
    blocks = len(config["vae"]["block_out_channels"])
    out = {f"model.diffusion_model.{unet_name(n, layers=layers, attention_up=up)}": t for n, t in unet.items()}
    for name, tensor in vae.items():
        original = vae_name(name, blocks=blocks)
        convolution = ".attn_1." in original and tensor.ndim == 2  # 1 × 1 convolutions, in this layout
        out[f"first_stage_model.{original}"] = tensor[:, :, None, None] if convolution else tensor
    if open_clip:
        count = config["text_encoder"]["num_hidden_layers"]
        out |= {f"cond_stage_model.model.{n}": t for n, t in open_clip_layout(text, layers=count).items()}
    else:
        out |= {f"cond_stage_model.transformer.text_model.{n}": t for n, t in text.items()}
        positions = torch.arange(77)[None]
        out["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
    out["betas"] = torch.linspace(0, 1, 10)
    return out


def sdxl_file(
    unet: Mapping[str, torch.Tensor],
    vae: Mapping[str, torch.Tensor],
    text: Mapping[str, torch.Tensor],
    text_2: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """The same of SDXL; `text_2` under the names of CLIPTextModelWithProjection."""
    out = {name: t for name, t in single_file(unet, vae, {}, config).items() if not name.startswith("cond_stage_model")}
    del out["betas"]
    first, second = "conditioner.embedders.0.transformer.text_model", "conditioner.embedders.1.model"
    out |= {f"{first}.{name}": tensor for name, tensor in text.items()}
    out[f"{first}.embeddings.position_ids"] = torch.arange(77)[None]
    inner = {name.removeprefix("text_model."): tensor for name, tensor in text_2.items() if "projection" not in name}
    layers = config["text_encoder_2"]["num_hidden_layers"]
    for name, tensor in open_clip_layout(inner, layers=layers).items():
        if f"resblocks.{layers}." not in name:
            out[f"{second}.{name}"] = tensor
    return out | {f"{second}.text_projection": text_2["text_projection.weight"].T}


def weights_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The parts' weights in a diffusers folder."""
    second = {"text_2": load_file(path)} if (path := folder / "text_encoder_2" / "model.safetensors").exists() else {}
    return second | {
        "unet": load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"),
        "vae": load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"),
        "text": load_file(folder / "text_encoder" / "model.safetensors"),
    }


def configuration(folder: Path, *, like: str = "sd1") -> dict[str, Any]:
    """A folder's configurations in the form of the shipped assets."""
    asset = json.loads((ASSETS / f"{like}.json").read_text())
    read = {p: json.loads((folder / p / "config.json").read_text()) for p in ("unet", "vae", "text_encoder")}
    return asset | read
