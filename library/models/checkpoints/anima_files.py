"""The parts of Anima on disk: the transformer with its LLM adapter in one file, text encoder and VAE in files of their
own, as its users have them; or a folder as diffusers writes one. Configurations follow from names and shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files.index import read_index
from library.files.tensors import TensorEntry
from library.models.checkpoints import wan_vae
from library.models.checkpoints.anima_names import adapter_entries, transformer_entries
from library.models.checkpoints.base_model import ASSETS, BaseModel, Part, read_json
from library.models.checkpoints.checkpoint import strip
from library.models.checkpoints.detect import ANIMA_PREFIXES, kind_of_file
from library.models.checkpoints.folder import entries_in
from library.models.checkpoints.open_file import locate
from library.models.checkpoints.shapes import count_of, shape_of

Entries = Mapping[str, TensorEntry]

TITLES = {
    "denoiser": "transformer",
    "vae": "VAE",
    "text_encoder": "text encoder Qwen3",
    "text_encoder_2": "LLM adapter",
}
_FOLDERS = {
    "denoiser": "transformer",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_conditioner",
}
_PATCH = 4  # latent cells of a token
_FIRST = "blocks.0.self_attn.q_norm.weight"
_SCALES = (".scale_weight", ".weight_scale", "scaled_fp8")


def configurations() -> dict[str, Any]:
    """Of the true model, by the folders that diffusers has for its parts."""
    return read_json(ASSETS / "anima.json")


def open_anima(path: str, location: Path, *, kind: str) -> BaseModel:
    """The parts that a folder or a file holds; those in files of their own are put in by `with_part`."""
    if location.is_dir():
        parts = {part: _part_of_folder(part, location / name) for part, name in _present(location).items()}
    else:
        parts = _of_file(path, read_index(location).entries)
    tokenizer, second = tokenizer_in(location / "tokenizer"), tokenizer_in(location / "t5_tokenizer")
    return BaseModel(kind, path, location, parts, tokenizer=tokenizer or Path(), tokenizer_2=second)


def _present(location: Path) -> dict[str, str]:
    return {part: name for part, name in _FOLDERS.items() if part == "denoiser" or (location / name).is_dir()}


def _part_of_folder(part: str, folder: Path) -> Part:
    readers: dict[str, Callable[[Entries], Entries]] = {
        "denoiser": dict,
        "vae": wan_vae.vae_entries,
        "text_encoder": _qwen_entries,
        "text_encoder_2": dict,
    }
    return Part(
        read_json(folder / "config.json"), f"the {TITLES[part]} in {folder}", lambda: readers[part](entries_in(folder))
    )


def _of_file(path: str, entries: Entries) -> dict[str, Part]:
    _refuse_scales(path, entries)
    inner = next(found for prefix in ANIMA_PREFIXES if (found := strip(entries, prefix)))
    config = _transformer_config(inner, path)
    parts = {"denoiser": Part(config, f"the transformer in {path}", lambda: transformer_entries(inner))}
    if adapter_entries(inner):
        parts["text_encoder_2"] = _adapter_of_file(inner, path)
    return parts


def _refuse_scales(path: str, names: Iterable[str]) -> None:
    if any(name.endswith(_SCALES) for name in names):
        raise UserError(f"{path}: its fp8 weights have scales beside them, which is not supported; bf16 and fp16 are")


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


def _qwen_of_file(entries: Entries, path: str) -> Part:
    found = _qwen_entries(entries)
    vocabulary, width = shape_of(found, "embed_tokens.weight", path)
    (head,) = shape_of(found, "layers.0.self_attn.q_norm.weight", path)
    queries, keys = (shape_of(found, f"layers.0.self_attn.{name}_proj.weight", path)[0] for name in "qk")
    config = configurations()["text_encoder"] | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(found, "layers.0.mlp.gate_proj.weight", path)[0],
        "num_hidden_layers": count_of(found, "layers"),
        "num_attention_heads": queries // head,
        "num_key_value_heads": keys // head,
        "head_dim": head,
    }
    return Part(config, f"the {TITLES['text_encoder']} in {path}", lambda: found)


def _qwen_entries(entries: Entries) -> dict[str, TensorEntry]:
    """The layers without the head that predicts words."""
    return {name.removeprefix("model."): e for name, e in entries.items() if not name.startswith("lm_head.")}


def _vae_of_file(entries: Entries, path: str) -> Part:
    """Of the true model's form, in its own or another width."""
    found = wan_vae.vae_entries(entries)
    width = shape_of(found, "encoder.conv_in.weight", path)[0]
    return Part(configurations()["vae"] | {"base_dim": width}, f"the VAE in {path}", lambda: found)


# By the part: a name that its files have, without their prefix, and how they are read
_OWN_FILES: Mapping[str, tuple[tuple[str, ...], Callable[[Entries, str], Part]]] = {
    "vae": ((wan_vae.MARK, "encoder.mid_block.attentions.0.to_qkv.weight"), _vae_of_file),
    "text_encoder": (
        ("model.layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_norm.weight"),
        _qwen_of_file,
    ),
    "text_encoder_2": (
        ("blocks.0.cross_attn.q_norm.weight", "llm_adapter.blocks.0.cross_attn.q_norm.weight"),
        _adapter_of_file,
    ),
}
_NOUNS = {
    "vae": "the VAE of Qwen-Image",
    "text_encoder": "the text encoder Qwen3-0.6B",
    "text_encoder_2": "Anima's LLM adapter",
}


def with_part(base: BaseModel, part: str, path: str, *, option: str) -> BaseModel:
    """The model with one of its parts from a file or folder of its own. A folder of the text encoder may hold its
    tokenizer, too. Raises UserError."""
    try:
        location = locate(path)
        made = _own_folder(part, location) if location.is_dir() else _own_file(part, location, path)
        made.entries()
    except UserError as error:
        raise UserError(f"--{option} {error}") from None
    tokenizer = tokenizer_in(location) if part == "text_encoder" and location.is_dir() else None
    return replace(base, parts={**base.parts, part: made}, tokenizer=tokenizer or base.tokenizer)


def _own_folder(part: str, location: Path) -> Part:
    folder = location if (location / "config.json").is_file() else location / _FOLDERS[part]
    return _part_of_folder(part, folder)


def _own_file(part: str, location: Path, path: str) -> Part:
    index = read_index(location)
    marks, read = _OWN_FILES[part]
    entries = next((found for prefix in ANIMA_PREFIXES if (found := strip(index.entries, prefix))), {})
    if not any(mark in entries for mark in marks):
        raise UserError(f"{path} is {kind_of_file(index).title}, and not {_NOUNS[part]}")
    _refuse_scales(path, index.entries)
    return read(entries, path)


def tokenizer_in(folder: Path) -> Path | None:
    """A folder with a tokenizer, or None: with a tokenizer.json, or with vocab.json and merges.txt."""
    if (folder / "tokenizer.json").is_file():
        return folder
    return folder if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() else None


def own_tokenizer(path: str, *, option: str, inside: str) -> Path:
    """The folder with the tokenizer that an option names, itself or its folder `inside`. UserError if there is none."""
    location = Path(path).expanduser()
    location = location.parent if location.is_file() else location
    for folder in (location, location / inside):
        if found := tokenizer_in(folder):
            return found
    raise UserError(f"--{option} {path}: there is no tokenizer.json in it, nor vocab.json with merges.txt")
