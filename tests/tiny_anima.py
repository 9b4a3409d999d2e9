"""A tiny Anima with random weights: every layer and name that the true one has.

    python -m tests.tiny_anima FOLDER

writes it as a folder of diffusers' parts. `original` and `wan_vae` turn weights into their original layouts: the
opposite way of library.models.checkpoints.{anima_names,parts.wan_vae}, written apart, so that each checks the other.
"""

from __future__ import annotations

import json
import re
import string
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from library.models.checkpoints.base_model import ASSETS
from tests.tiny_flux import t5_tokenizer

BLOCKS, WIDTH, STATES, CHANNELS, TEXT_LAYERS = 3, 64, 32, 16, 2
VOCABULARY = 128


def configuration() -> dict[str, Any]:
    """In the form of assets/anima.json: fewer and narrower blocks."""
    asset: dict[str, Any] = json.loads((ASSETS / "anima.json").read_text(encoding="utf-8"))
    asset["transformer"] |= {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2, "num_layers": BLOCKS}
    asset["transformer"] |= {"text_embed_dim": STATES, "adaln_lora_dim": 16}
    asset["vae"] |= {"base_dim": 8}
    asset["text_encoder"] |= {"vocab_size": VOCABULARY, "hidden_size": STATES, "intermediate_size": 64}
    asset["text_encoder"] |= {"num_hidden_layers": TEXT_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    asset["text_encoder"] |= {"head_dim": 8}
    asset["text_conditioner"] |= {"source_dim": STATES, "target_dim": STATES, "model_dim": STATES, "num_layers": 2}
    asset["text_conditioner"] |= {"num_attention_heads": 2, "target_vocab_size": VOCABULARY}
    return asset


def qwen_tokenizer() -> Any:
    """A tokenizer of letters that adds no special tokens, as Qwen's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [("<|endoftext|>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words += [(letter, -3.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    made = Tokenizer(models.Unigram(words, unk_id=1, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return made


def parts() -> dict[str, Any]:
    """diffusers' and transformers' own modules, by their folders; the same bits each time."""
    from diffusers import AutoencoderKLQwenImage, CosmosTransformer3DModel
    from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner
    from transformers import Qwen3Config, Qwen3Model

    config = configuration()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: dict[str, Any] = {
            "transformer": CosmosTransformer3DModel.from_config(config["transformer"]),
            "vae": AutoencoderKLQwenImage.from_config(config["vae"]),
            "text_encoder": Qwen3Model(Qwen3Config(**config["text_encoder"])),
            "text_conditioner": AnimaTextConditioner.from_config(config["text_conditioner"]),
        }
        spread(made["text_encoder"])
    with torch.no_grad():
        # an untrained encoder's latents hardly vary; here they do about as much as the noise
        made["vae"].quant_conv.weight[:CHANNELS] *= 16
        # behind a norm, the last layer as it is made is too small for velocities of that size
        made["transformer"].proj_out.weight *= 3
    return made


def spread(encoder: torch.nn.Module) -> None:
    """Weights that tell prompts apart: transformers initialises so weakly that all would look alike."""
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else parameter.shape[1] ** -0.5)


def write(folder: Path) -> Path:
    """Write the model into `folder`; the same bits each time."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import PreTrainedTokenizerFast

    for name, module in parts().items():
        module.save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    PreTrainedTokenizerFast(
        tokenizer_object=qwen_tokenizer(), unk_token="<unk>", pad_token="<|endoftext|>"
    ).save_pretrained(folder / "tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=t5_tokenizer(), eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder / "t5_tokenizer")
    return folder


def original(states: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The transformer's and the LLM adapter's weights under their original names, with tables that true files have."""
    found = {f"llm_adapter.{name}": tensor for name, tensor in adapter.items()}
    rules = (
        (r"transformer_blocks\.(\d+)\.attn1\.", r"blocks.\1.self_attn."),
        (r"transformer_blocks\.(\d+)\.attn2\.", r"blocks.\1.cross_attn."),
        (r"\.to_out\.0\.", r".output_proj."),
        (r"\.to_([qkv])\.", r".\1_proj."),
        (r"\.norm_([qk])\.", r".\1_norm."),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.layer1."),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.layer2."),
        (r"transformer_blocks\.(\d+)\.norm1\.linear_(\d)", r"blocks.\1.adaln_modulation_self_attn.\2"),
        (r"transformer_blocks\.(\d+)\.norm2\.linear_(\d)", r"blocks.\1.adaln_modulation_cross_attn.\2"),
        (r"transformer_blocks\.(\d+)\.norm3\.linear_(\d)", r"blocks.\1.adaln_modulation_mlp.\2"),
        (r"^norm_out\.linear_(\d)", r"final_layer.adaln_modulation.\1"),
        (r"^proj_out", "final_layer.linear"),
        (r"^time_embed\.t_embedder", "t_embedder.1"),
        (r"^time_embed\.norm", "t_embedding_norm"),
        (r"^patch_embed\.proj", "x_embedder.proj.1"),
    )
    for name, tensor in states.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    found |= {f"pos_embedder.{name}": torch.zeros(4) for name in ("seq", "dim_spatial_range", "dim_temporal_range")}
    return found


def wan_vae(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The VAE's weights under their original names."""
    layers = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    layers["conv_shortcut"] = "shortcut"
    found = {}
    for name, tensor in states.items():
        words = name.split(".")
        layer = ".".join(layers.get(word, word) for word in words)
        if match := re.fullmatch(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)\.(.+)", layer):
            layer = f"decoder.upsamples.{4 * int(match[1]) + int(match[2])}.{match[3]}"
        elif match := re.fullmatch(r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.(.+)", layer):
            layer = f"decoder.upsamples.{4 * int(match[1]) + 3}.{match[2]}"
        layer = re.sub(r"^encoder\.down_blocks\.", "encoder.downsamples.", layer)
        layer = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda m: f".middle.{2 * int(m[1])}.", layer)
        layer = layer.replace(".mid_block.attentions.0.", ".middle.1.").replace(".conv_in.", ".conv1.")
        layer = layer.replace(".norm_out.", ".head.0.").replace(".conv_out.", ".head.2.")
        layer = re.sub(r"^quant_conv\.", "conv1.", layer)
        found[re.sub(r"^post_quant_conv\.", "conv2.", layer)] = tensor
    return found


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Of one part."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def single_files(
    folder: Path, target: Path, *, dtype: torch.dtype = torch.float32, prefix: str = "net."
) -> dict[str, Path]:
    """The files that the model's users have, by the options that name them. The transformer and the LLM adapter in its
    file are of `dtype`, behind `prefix`."""
    target.mkdir(parents=True, exist_ok=True)
    whole = original(weights_in(folder / "transformer"), weights_in(folder / "text_conditioner"))
    contents = {
        "pretrained_model_name_or_path": {f"{prefix}{name}": tensor.to(dtype) for name, tensor in whole.items()},
        "qwen3": {f"model.{name}": tensor for name, tensor in weights_in(folder / "text_encoder").items()},
        "vae": wan_vae(weights_in(folder / "vae")),
    }
    names = {
        "pretrained_model_name_or_path": "anima-preview",
        "qwen3": "qwen_3_06b_base",
        "vae": "qwen_image_vae",
    }
    found = {}
    for option, tensors in contents.items():
        found[option] = target / f"{names[option]}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, found[option])
    tokenizers = {"qwen3_tokenizer_path": folder / "tokenizer", "t5_tokenizer_path": folder / "t5_tokenizer"}
    return {**found, **tokenizers}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
