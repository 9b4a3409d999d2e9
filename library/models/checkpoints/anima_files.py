"""The parts of Anima on disk: the transformer with its LLM adapter in one file, text encoder and VAE in files of their
own, as its users have them; or a folder as diffusers writes one. Configurations follow from names and shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.files.index import read_index
from library.files.scaled_fp8 import with_scales
from library.models.checkpoints.anima_names import adapter_entries, transformer_entries
from library.models.checkpoints.base_model import ASSETS, BaseModel, Part, read_json
from library.models.checkpoints.detect import ANIMA_PREFIXES
from library.models.checkpoints.part_files import (
    Entries,
    PartFiles,
    parts_in,
    tokenizer_in,
    without_prefix,
)
from library.models.checkpoints.parts import wan_vae
from library.models.checkpoints.parts.qwen3_files import qwen3_files
from library.models.checkpoints.shapes import count_of, shape_of

_PATCH = 4  # latent cells of a token
_FIRST = "blocks.0.self_attn.q_norm.weight"


def configurations() -> dict[str, Any]:
    """Of the true model, by the folders that diffusers has for its parts."""
    return read_json(ASSETS / "anima.json")


def open_anima(path: str, location: Path, *, kind: str) -> BaseModel:
    """The parts that a folder or a file holds; those in files of their own are put in by `with_part`."""
    parts = parts_in(location, PARTS) if location.is_dir() else _of_file(path, read_index(location).entries)
    tokenizer, second = tokenizer_in(location / "tokenizer"), tokenizer_in(location / "t5_tokenizer")
    return BaseModel(kind, path, location, parts, tokenizer=tokenizer or Path(), tokenizer_2=second)


def _of_file(path: str, entries: Entries) -> dict[str, Part]:
    entries = with_scales(path, entries)
    inner = without_prefix(entries, ANIMA_PREFIXES)
    config = _transformer_config(inner, path)
    parts = {"denoiser": Part(config, f"the transformer in {path}", lambda: transformer_entries(inner))}
    if adapter_entries(inner):
        parts["text_encoder_2"] = _adapter_of_file(inner, path)
    return parts


def _transformer_config(entries: Entries, path: str) -> dict[str, Any]:
    """From the shapes of a file in the original layout."""
    (width, inputs), (head,) = shape_of(entries, "x_embedder.proj.1.weight", path), shape_of(entries, _FIRST, path)
    outputs = shape_of(entries, "final_layer.linear.weight", path)[0]
    return configurations()["transformer"] | {
        "in_channels": inputs // _PATCH - 1,  # one is a mask
        "out_channels": outputs // _PATCH,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": count_of(entries, "blocks"),
        "mlp_ratio": shape_of(entries, "blocks.0.mlp.layer1.weight", path)[0] / width,
        "text_embed_dim": shape_of(entries, "blocks.0.cross_attn.k_proj.weight", path)[1],
        "adaln_lora_dim": shape_of(entries, "blocks.0.adaln_modulation_mlp.1.weight", path)[0],
    }


def _adapter_of_file(entries: Entries, path: str) -> Part:
    """The LLM adapter beside a transformer, or in a file of its own."""
    found = adapter_entries(entries) or dict(entries)
    vocabulary, target = shape_of(found, "embed.weight", path)
    width = shape_of(found, "out_proj.weight", path)[1]
    config = configurations()["text_conditioner"] | {
        "source_dim": shape_of(found, "blocks.0.cross_attn.k_proj.weight", path)[1],
        "target_dim": target,
        "model_dim": width,
        "num_layers": count_of(found, "blocks"),
        "num_attention_heads": width // shape_of(found, "blocks.0.cross_attn.q_norm.weight", path)[0],
        "mlp_ratio": shape_of(found, "blocks.0.mlp.0.weight", path)[0] / width,
        "target_vocab_size": vocabulary,
        "use_self_attention": "blocks.0.self_attn.q_proj.weight" in found,
        "use_layer_norm": "blocks.0.norm_mlp.bias" in found,
    }
    return Part(config, f"the LLM adapter in {path}", lambda: found)


def _vae_of_file(entries: Entries, path: str) -> Part:
    """Of the true model's form, in its own or another width."""
    found = wan_vae.vae_entries(entries)
    width = shape_of(found, "encoder.conv_in.weight", path)[0]
    return Part(configurations()["vae"] | {"base_dim": width}, f"the VAE in {path}", lambda: found)


PARTS = {
    "denoiser": PartFiles(folder="transformer", title="transformer"),
    "vae": PartFiles(
        folder="vae",
        title="VAE",
        in_folder=lambda entries, config: wan_vae.vae_entries(entries),
        noun="the VAE of Qwen-Image",
        marks=(wan_vae.MARK, "encoder.mid_block.attentions.0.to_qkv.weight"),
        prefixes=ANIMA_PREFIXES,
        read=_vae_of_file,
    ),
    "text_encoder": qwen3_files(
        "the text encoder Qwen3-0.6B", lambda: configurations()["text_encoder"], prefixes=ANIMA_PREFIXES
    ),
    "text_encoder_2": PartFiles(
        folder="text_conditioner",
        title="LLM adapter",
        noun="Anima's LLM adapter",
        marks=("blocks.0.cross_attn.q_norm.weight", "llm_adapter.blocks.0.cross_attn.q_norm.weight"),
        prefixes=ANIMA_PREFIXES,
        read=_adapter_of_file,
    ),
}
