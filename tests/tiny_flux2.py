"""A tiny FLUX.2 klein with random weights: every layer and name that the true one has, at its true size of heads.

    python -m tests.tiny_flux2 FOLDER

writes it as a diffusers folder. `original` and `original_vae` turn weights into their original layouts: the opposite
way of library.models.checkpoints.{flux2_names,flux2_files}, written apart from it, so that each checks the other.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from library.models.checkpoints.base_model import ASSETS
from tests import tiny_z_image
from tests.tiny_anima import spread, weights_in

DOUBLES, SINGLES, WIDTH, STATES, TEXT_LAYERS, CHANNELS = 2, 2, 128, 32, 30, 4
LAYERS = 12 * DOUBLES + 2 * SINGLES  # that get adapters


def configuration() -> dict[str, Any]:
    """In the form of assets/flux2.json, with the text encoder: fewer blocks, one head, narrower encoders."""
    asset: dict[str, Any] = json.loads((ASSETS / "flux2.json").read_text(encoding="utf-8"))
    asset["transformer"] |= {"num_layers": DOUBLES, "num_single_layers": SINGLES, "num_attention_heads": 1}
    asset["transformer"] |= {"in_channels": 4 * CHANNELS, "joint_attention_dim": 3 * STATES}
    asset["vae"] |= {"latent_channels": CHANNELS, "block_out_channels": [32, 32, 64, 64]}
    text = tiny_z_image.configuration()["text_encoder"] | {"num_hidden_layers": TEXT_LAYERS}
    return {**asset, "text_encoder": text}


def pipeline(*, distilled: bool = False) -> Any:
    """diffusers' pipeline of diffusers' and transformers' own modules; the same bits each time."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = configuration()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Flux2KleinPipeline(
            vae=AutoencoderKLFlux2.from_config(config["vae"]),
            text_encoder=Qwen3ForCausalLM(Qwen3Config(**config["text_encoder"])),
            tokenizer=tiny_z_image.tokenizer(),
            transformer=Flux2Transformer2DModel.from_config(config["transformer"]),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            is_distilled=distilled,
        )
        spread(made.text_encoder)
        with torch.no_grad():
            # an untrained encoder's latents hardly vary; here they do about as much as the noise
            made.vae.encoder.conv_out.weight[:CHANNELS] *= 8
            made.vae.bn.running_mean.normal_(std=0.3)
            made.vae.bn.running_var.uniform_(0.5, 2.0)
            # behind a norm, the last layer as it is made is too small for velocities of that size
            made.transformer.proj_out.weight *= 3
    made.vae.eval()
    return made


def write(folder: Path) -> Path:
    """Write the model into `folder`; the same bits each time."""
    pipeline().save_pretrained(folder)
    return folder


def original(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The transformer's weights under their original names."""
    left = dict(states)
    found: dict[str, torch.Tensor] = {}

    def move(new: str, *old: str) -> None:
        found[new] = torch.cat([left.pop(f"{name}.weight") for name in old])

    for which in ("in", "out"):
        move(f"time_in.{which}_layer.weight", f"time_guidance_embed.timestep_embedder.linear_{1 + (which == 'out')}")
    move("img_in.weight", "x_embedder")
    move("txt_in.weight", "context_embedder")
    move("final_layer.linear.weight", "proj_out")
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        move(f"{name}.lin.weight", f"{name}.linear")
    scale, shift = left.pop("norm_out.linear.weight").chunk(2)
    found["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    streams = {
        "img": ("attn.to_{}", "attn.to_out.0", "attn.norm_{}", "ff"),
        "txt": ("attn.add_{}_proj", "attn.to_add_out", "attn.norm_added_{}", "ff_context"),
    }
    for i in range(DOUBLES):
        block, old = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, (qkv, out, rms, mlp) in streams.items():
            move(f"{block}.{stream}_attn.qkv.weight", *(f"{old}.{qkv.format(which)}" for which in "qkv"))
            move(f"{block}.{stream}_attn.proj.weight", f"{old}.{out}")
            for long, short in {"query": "q", "key": "k"}.items():
                move(f"{block}.{stream}_attn.norm.{long}_norm.scale", f"{old}.{rms.format(short)}")
            move(f"{block}.{stream}_mlp.0.weight", f"{old}.{mlp}.linear_in")
            move(f"{block}.{stream}_mlp.2.weight", f"{old}.{mlp}.linear_out")
    for i in range(SINGLES):
        block, old = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        move(f"{block}.linear1.weight", f"{old}.attn.to_qkv_mlp_proj")
        move(f"{block}.linear2.weight", f"{old}.attn.to_out")
        for long, short in {"query": "q", "key": "k"}.items():
            move(f"{block}.norm.{long}_norm.scale", f"{old}.attn.norm_{short}")
    assert not left, f"no original name: {sorted(left)}"
    return found


def original_vae(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The autoencoder's weights under their original names."""
    rules = (
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
        (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
        (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
        (r"encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block."),
        (r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
        (r"^quant_conv\.", "encoder.quant_conv."),
        (r"^post_quant_conv\.", "decoder.post_quant_conv."),
    )
    found = {}
    for name, tensor in states.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        if match := re.fullmatch(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)(\.0)?\.(.+)", name):
            inner = f"block{match[3] or ''}" if match[2] == "resnets" else "upsample"
            name = f"decoder.up.{3 - int(match[1])}.{inner}.{match[4]}"
        is_matrix = ".attn_1." in name and tensor.ndim == 2
        found[name] = tensor[..., None, None] if is_matrix else tensor  # 1 × 1 convolutions
    return found


def single_files(
    folder: Path, target: Path, *, dtype: torch.dtype = torch.float32, prefix: str = ""
) -> dict[str, Path]:
    """The files that the model's users have, by the options that name them. The transformer is of `dtype`, its names
    behind `prefix`."""
    target.mkdir(parents=True, exist_ok=True)
    whole = original(weights_in(folder / "transformer"))
    contents = {
        "pretrained_model_name_or_path": {f"{prefix}{name}": tensor.to(dtype) for name, tensor in whole.items()},
        "qwen3": weights_in(folder / "text_encoder"),
        "ae": original_vae(weights_in(folder / "vae")),
    }
    names = {"pretrained_model_name_or_path": "flux2-klein-base-4b", "qwen3": "qwen_3_4b"}
    found = {}
    for option, tensors in contents.items():
        found[option] = target / f"{names.get(option, option)}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, found[option])
    return {**found, "qwen3_tokenizer_path": folder / "tokenizer"}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
