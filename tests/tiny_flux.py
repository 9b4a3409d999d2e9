"""A tiny FLUX.1 with random weights: every layer and name that the true one has, at its true size of heads.

    python -m tests.tiny_flux FOLDER

writes it as a diffusers folder. `original` turns such a folder's transformer into the original layout: the opposite way
of library.models.checkpoints.flux_names, written apart from it, so that each checks the other.
"""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from library.models.checkpoints.base_model import ASSETS

DOUBLES, SINGLES, WIDTH, CLIP_WIDTH, T5_WIDTH = 2, 3, 128, 64, 32


def configuration(*, guidance: bool = True) -> dict[str, Any]:
    """In the form of assets/flux.json: fewer blocks, one head, narrower encoders."""
    asset: dict[str, Any] = json.loads((ASSETS / "flux.json").read_text(encoding="utf-8"))
    asset["transformer"] |= {
        "num_layers": DOUBLES,
        "num_single_layers": SINGLES,
        "num_attention_heads": 1,
        "joint_attention_dim": T5_WIDTH,
        "pooled_projection_dim": CLIP_WIDTH,
        "guidance_embeds": guidance,
    }
    asset["vae"] |= {
        "sample_size": 64,
        "block_out_channels": [16, 16, 16, 16],
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    asset["text_encoder"] |= {"hidden_size": CLIP_WIDTH, "intermediate_size": 128, "num_hidden_layers": 2}
    asset["text_encoder"] |= {"num_attention_heads": 1, "projection_dim": CLIP_WIDTH}
    asset["text_encoder_2"] |= {"vocab_size": 128, "d_model": T5_WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    asset["text_encoder_2"] |= {"num_heads": 4}
    return asset


def t5_tokenizer() -> Any:
    """A tokenizer of letters, with the special tokens and the end that T5's has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words += [(letter, -3.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    made = Tokenizer(models.Unigram(words, unk_id=2, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return made


def write(folder: Path, *, guidance: bool = True) -> Path:
    """Write the model into `folder`; the same bits each time. guidance: dev's, else schnell's."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )

    config = configuration(guidance=guidance)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = FluxPipeline(
            vae=AutoencoderKL.from_config(config["vae"]),
            text_encoder=CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
            text_encoder_2=T5EncoderModel(T5Config(**config["text_encoder_2"])),
            tokenizer=CLIPTokenizer.from_pretrained(ASSETS / "clip_tokenizer"),
            tokenizer_2=PreTrainedTokenizerFast(
                tokenizer_object=t5_tokenizer(), eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
            ),
            transformer=FluxTransformer2DModel.from_config(config["transformer"]),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance),
        )
        # transformers initialises so weakly that all prompts would look alike
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            for name, parameter in encoder.named_parameters():
                if parameter.ndim == 2:
                    is_table = "embedding" in name or "shared" in name
                    torch.nn.init.normal_(parameter, std=0.3 if is_table else parameter.shape[1] ** -0.5)
        with torch.no_grad():
            # an untrained encoder's latents hardly vary; here they do about as much as the noise
            pipeline.vae.encoder.conv_out.weight[:16] *= 8
            # behind a norm, the last layer as it is made is too small for velocities of that size
            pipeline.transformer.proj_out.weight *= 3
    pipeline.save_pretrained(folder)
    return folder


def original(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The transformer's weights under their original names."""
    left = dict(states)
    found: dict[str, torch.Tensor] = {}

    def move(new: str, *old: str, leaf: str = "") -> None:
        for end in (leaf,) if leaf else ("weight", "bias"):
            found[f"{new}.{'scale' if leaf else end}"] = torch.cat([left.pop(f"{name}.{end}") for name in old])

    embedding = "time_text_embed"
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
    for new, old in embedders.items():
        if f"{embedding}.{old}.linear_1.weight" in left:
            move(f"{new}.in_layer", f"{embedding}.{old}.linear_1")
            move(f"{new}.out_layer", f"{embedding}.{old}.linear_2")
    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    move("final_layer.linear", "proj_out")
    has_modulation = "norm_out.linear.weight" in left  # Chroma has none
    for leaf in ("weight", "bias") if has_modulation else ():
        scale, shift = left.pop(f"norm_out.linear.{leaf}").chunk(2)
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    for i in range(DOUBLES):
        block, old = f"double_blocks.{i}", f"transformer_blocks.{i}"
        streams = {
            "img": ("norm1", "attn.to_{}", "attn.to_out.0", "attn.norm_{}", "ff"),
            "txt": ("norm1_context", "attn.add_{}_proj", "attn.to_add_out", "attn.norm_added_{}", "ff_context"),
        }
        for stream, (norm, qkv, out, rms, mlp) in streams.items():
            if has_modulation:
                move(f"{block}.{stream}_mod.lin", f"{old}.{norm}.linear")
            move(f"{block}.{stream}_attn.qkv", *(f"{old}.{qkv.format(which)}" for which in "qkv"))
            move(f"{block}.{stream}_attn.proj", f"{old}.{out}")
            for long, short in {"query": "q", "key": "k"}.items():
                move(f"{block}.{stream}_attn.norm.{long}_norm", f"{old}.{rms.format(short)}", leaf="weight")
            move(f"{block}.{stream}_mlp.0", f"{old}.{mlp}.net.0.proj")
            move(f"{block}.{stream}_mlp.2", f"{old}.{mlp}.net.2")
    for i in range(SINGLES):
        block, old = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        move(f"{block}.linear1", *(f"{old}.attn.to_{which}" for which in "qkv"), f"{old}.proj_mlp")
        move(f"{block}.linear2", f"{old}.proj_out")
        if has_modulation:
            move(f"{block}.modulation.lin", f"{old}.norm.linear")
        for long, short in {"query": "q", "key": "k"}.items():
            move(f"{block}.norm.{long}_norm", f"{old}.attn.norm_{short}", leaf="weight")
    assert not left, f"no original name: {sorted(left)}"
    return found


def single_files(folder: Path, target: Path, *, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """The files that kohya's users have, by the options that name them: of the model in a diffusers folder. The
    transformer is of `dtype`."""
    target.mkdir(parents=True, exist_ok=True)
    transformer = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    t5 = load_file(folder / "text_encoder_2" / "model.safetensors")
    contents = {
        "pretrained_model_name_or_path": {
            name: tensor.to(dtype).contiguous() for name, tensor in original(transformer).items()
        },
        "clip_l": {
            f"text_model.{name.removeprefix('text_model.')}": tensor
            for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items()
        },
        # the true files hold the table of tokens twice
        "t5xxl": {**t5, "encoder.embed_tokens.weight": t5["shared.weight"].clone()},
    }
    found = {}
    for option, tensors in contents.items():
        name = {"pretrained_model_name_or_path": "flux1-dev", "t5xxl": "t5xxl_fp16"}.get(option, option)
        found[option] = target / f"{name}.safetensors"
        save_file(tensors, found[option])
    # the autoencoder's size is in no file: the true one's needs no configuration
    return {**found, "ae": folder / "vae", "t5_tokenizer_path": folder / "tokenizer_2"}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
