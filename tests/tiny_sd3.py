"""A tiny Stable Diffusion 3.5 with random weights: every layer and name that the true ones have, at the true size of
heads.

    python -m tests.tiny_sd3 FOLDER

writes it as a diffusers folder. `original` turns such a folder's transformer into the original layout: the opposite way
of library.models.checkpoints.sd3.names, written apart from it, so that each checks the other.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from library.models.checkpoints.base_model import ASSETS
from library.models.checkpoints.sd3.files import configurations
from tests import tiny_flux
from tests.tiny_anima import spread

BLOCKS, WIDTH, L_WIDTH, G_WIDTH, T5_WIDTH, PLACES = 3, 128, 64, 128, 256, 8
KINDS: dict[str, dict[str, Any]] = {
    "medium": {"qk_norm": None, "dual_attention_layers": ()},
    "5-medium": {"dual_attention_layers": (0, 1)},
    "5-large": {"dual_attention_layers": ()},
}
"""By kohya's words, what each has in the transformer's configuration."""


def configuration(kind: str = "5-medium") -> dict[str, Any]:
    """In the form of `configurations`: fewer blocks, two heads, narrower encoders, places for 128 pixels a side."""
    found = configurations()
    found["transformer"] |= {
        "num_layers": BLOCKS,
        "num_attention_heads": WIDTH // 64,
        "caption_projection_dim": WIDTH,
        "joint_attention_dim": T5_WIDTH,
        "pooled_projection_dim": L_WIDTH + G_WIDTH,
        "pos_embed_max_size": PLACES,
        "sample_size": 16,
        **KINDS[kind],
    }
    tiny = tiny_flux.configuration()
    small = {"intermediate_size": 128, "num_hidden_layers": 2}
    found["vae"] |= {**tiny["vae"], **{name: found["vae"][name] for name in ("scaling_factor", "shift_factor")}}
    found["text_encoder"] |= {**small, "hidden_size": L_WIDTH, "num_attention_heads": 1, "projection_dim": L_WIDTH}
    found["text_encoder_2"] |= {**small, "hidden_size": G_WIDTH, "num_attention_heads": 2, "projection_dim": G_WIDTH}
    found["text_encoder_3"] |= {**tiny["text_encoder_2"], "d_model": T5_WIDTH}
    return found


def pipeline(kind: str = "5-medium") -> Any:
    """diffusers' pipeline of diffusers' and transformers' own modules; the same bits each time."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )

    config = configuration(kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = StableDiffusion3Pipeline(
            vae=AutoencoderKL.from_config(config["vae"]),
            text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder"])),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])),
            text_encoder_3=T5EncoderModel(T5Config(**config["text_encoder_3"])),
            tokenizer=CLIPTokenizer.from_pretrained(ASSETS / "clip_tokenizer"),
            tokenizer_2=CLIPTokenizer.from_pretrained(ASSETS / "clip_tokenizer", pad_token="!"),
            tokenizer_3=PreTrainedTokenizerFast(
                tokenizer_object=tiny_flux.t5_tokenizer(), eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
            ),
            transformer=SD3Transformer2DModel.from_config(config["transformer"]),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        for encoder in (made.text_encoder, made.text_encoder_2, made.text_encoder_3):
            spread(encoder)
        with torch.no_grad():
            made.text_encoder.text_projection.weight.copy_(torch.eye(L_WIDTH))  # as in the true folders
            # an untrained encoder's latents hardly vary; here they do about as much as the noise
            made.vae.encoder.conv_out.weight[:16] *= 2
            # behind a norm, the last layer as it is made is too small for velocities of that size
            made.transformer.proj_out.weight *= 3
            made.transformer.pos_embed.pos_embed.normal_()  # not what a formula gives: that it is read shows
    return made


def write(folder: Path, kind: str = "5-medium") -> Path:
    """Write the model into `folder`; the same bits each time."""
    pipeline(kind).save_pretrained(folder)
    return folder


def original(states: Mapping[str, torch.Tensor], *, blocks: int = BLOCKS) -> dict[str, torch.Tensor]:
    """The transformer's weights under their original names."""
    left = dict(states)
    found: dict[str, torch.Tensor] = {"pos_embed": left.pop("pos_embed.pos_embed")}

    def move(new: str, *old: str) -> None:
        for end in ("weight", "bias"):
            if f"{old[0]}.{end}" in left:
                found[f"{new}.{end}"] = torch.cat([left.pop(f"{name}.{end}") for name in old])

    def swap(new: str) -> None:
        for end in ("weight", "bias"):
            scale, shift = found[f"{new}.{end}"].chunk(2)
            found[f"{new}.{end}"] = torch.cat([shift, scale])

    move("x_embedder.proj", "pos_embed.proj")
    move("context_embedder", "context_embedder")
    for new, old in {"t_embedder": "timestep_embedder", "y_embedder": "text_embedder"}.items():
        move(f"{new}.mlp.0", f"time_text_embed.{old}.linear_1")
        move(f"{new}.mlp.2", f"time_text_embed.{old}.linear_2")
    for i in range(blocks):
        new, old = f"joint_blocks.{i}", f"transformer_blocks.{i}"
        for attention in ("attn", "attn2"):
            move(f"{new}.x_block.{attention}.qkv", *(f"{old}.{attention}.to_{which}" for which in "qkv"))
            move(f"{new}.x_block.{attention}.proj", f"{old}.{attention}.to_out.0")
            for which in "qk":
                move(f"{new}.x_block.{attention}.ln_{which}", f"{old}.{attention}.norm_{which}")
        move(f"{new}.context_block.attn.qkv", *(f"{old}.attn.add_{which}_proj" for which in "qkv"))
        move(f"{new}.context_block.attn.proj", f"{old}.attn.to_add_out")
        for which in "qk":
            move(f"{new}.context_block.attn.ln_{which}", f"{old}.attn.norm_added_{which}")
        for stream, end in (("x_block", ""), ("context_block", "_context")):
            move(f"{new}.{stream}.adaLN_modulation.1", f"{old}.norm1{end}.linear")
            move(f"{new}.{stream}.mlp.fc1", f"{old}.ff{end}.net.0.proj")
            move(f"{new}.{stream}.mlp.fc2", f"{old}.ff{end}.net.2")
    swap(f"joint_blocks.{blocks - 1}.context_block.adaLN_modulation.1")
    move("final_layer.linear", "proj_out")
    move("final_layer.adaLN_modulation.1", "norm_out.linear")
    swap("final_layer.adaLN_modulation.1")
    assert not left, f"no original name: {sorted(left)}"
    return found


def single_files(folder: Path, target: Path, *, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """The files that kohya's users have, by the options that name them: of the model in a diffusers folder. The
    transformer is of `dtype`."""
    target.mkdir(parents=True, exist_ok=True)
    whole = original(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    t5 = load_file(folder / "text_encoder_3" / "model.safetensors")
    contents = {
        "pretrained_model_name_or_path": {f"model.diffusion_model.{name}": t.to(dtype) for name, t in whole.items()},
        # of CLIP-L without the identity
        "clip_l": {
            name: tensor
            for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items()
            if name != "text_projection.weight"
        },
        "clip_g": load_file(folder / "text_encoder_2" / "model.safetensors"),
        # the true files hold the table of tokens twice
        "t5xxl": {**t5, "encoder.embed_tokens.weight": t5["shared.weight"].clone()},
    }
    names = {"pretrained_model_name_or_path": "sd3.5_medium", "t5xxl": "t5xxl_fp16"}
    found = {}
    for option, tensors in contents.items():
        found[option] = target / f"{names.get(option, option)}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, found[option])
    # the VAE's size is in no file: the true one's needs no configuration
    return {**found, "vae": folder / "vae", "t5_tokenizer_path": folder / "tokenizer_3"}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
