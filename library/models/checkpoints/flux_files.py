"""The parts of FLUX.1 and Chroma on disk: a diffusers folder, a file in the original layout, and text encoders and an
autoencoder in files of their own, as kohya's users have them. No weight is read here: configurations follow from names
and shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files.index import read_index
from library.files.json_text import Config
from library.files.scaled_fp8 import with_scales
from library.files.tensors import TensorEntry
from library.models.checkpoints.base_model import ASSETS, BaseModel, Part, read_json
from library.models.checkpoints.checkpoint import (
    UNET_PREFIX,
    VAE_PREFIX,
    strip,
    text_encoder_entries,
    vae_entries,
)
from library.models.checkpoints.flux_names import transformer_entries
from library.models.checkpoints.part_files import Entries, PartFiles, parts_in, without_prefix
from library.models.checkpoints.shapes import count_of, shape_of

VAES = ("vae.", VAE_PREFIX)
"""How the names of the autoencoder begin in files of a whole model."""
_CLIP, _T5 = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."
_APPROXIMATOR = "distilled_guidance_layer"
_FIRST = "double_blocks.0.img_attn.norm.key_norm.scale"
_T5_TIED = "encoder.embed_tokens.weight"  # the same as shared.weight; files have either or both
_CLIP_HEAD = 64  # channels of a head of CLIP; no shape tells


def configurations() -> dict[str, Any]:
    """Of the true FLUX.1 dev, by part."""
    return read_json(ASSETS / "flux.json")


def chroma_configurations() -> dict[str, Any]:
    """Of the true Chroma, by the folders of its parts. Its text encoder and its autoencoder are FLUX.1's."""
    flux = configurations()
    return {"text_encoder": flux["text_encoder_2"], "vae": flux["vae"], **read_json(ASSETS / "chroma.json")}


def open_flux(path: str, location: Path, *, kind: str) -> BaseModel:
    """The parts that a folder or a file holds; those in files of their own are put in by `with_part`. UserError for a
    model of other sizes than FLUX.1's layout can have."""
    inputs = configurations()["transformer"]["in_channels"]
    parts = (
        _of_folder(location, PARTS, inputs=inputs, model="FLUX.1 dev and schnell take")
        if location.is_dir()
        else _of_file(path, read_index(location).entries, PARTS, _transformer_config)
    )
    tokenizer, second = location / "tokenizer", location / "tokenizer_2"
    return BaseModel(
        kind,
        path,
        location,
        parts,
        tokenizer=tokenizer if (tokenizer / "vocab.json").is_file() else ASSETS / "clip_tokenizer",
        tokenizer_2=second if (second / "tokenizer.json").is_file() else None,
    )


def open_chroma(path: str, location: Path, *, kind: str) -> BaseModel:
    """As `open_flux`, of Chroma."""
    inputs = chroma_configurations()["transformer"]["in_channels"]
    parts = (
        _of_folder(location, CHROMA_PARTS, inputs=inputs, model="Chroma takes")
        if location.is_dir()
        else _of_file(path, read_index(location).entries, CHROMA_PARTS, _chroma_config)
    )
    tokenizer, scheduler = location / "tokenizer", location / "scheduler" / "scheduler_config.json"
    return BaseModel(
        kind,
        path,
        location,
        parts,
        scheduler=read_json(scheduler) if scheduler.is_file() else {},
        tokenizer_2=tokenizer if (tokenizer / "tokenizer.json").is_file() else None,
    )


def _of_folder(folder: Path, kinds: Mapping[str, PartFiles], *, inputs: int, model: str) -> dict[str, Part]:
    found = parts_in(folder, kinds)
    own = found["denoiser"].config.get("in_channels")
    if own != inputs:
        raise UserError(f"{folder / 'transformer'}: takes {own} channels, where {model} {inputs}")
    return found


def _of_file(
    path: str,
    entries: Entries,
    kinds: Mapping[str, PartFiles],
    config: Callable[[Entries, str], dict[str, Any]],
) -> dict[str, Part]:
    """kinds: the text encoders among them can be in the file. config: of the transformer, from its names."""
    entries = with_scales(path, entries)
    whole = strip(entries, UNET_PREFIX) or {
        name: entry for name, entry in entries.items() if not name.startswith(("text_encoders.", *VAES))
    }
    where = f"the transformer in {path}"
    parts = {"denoiser": Part(config(whole, path), where, lambda: transformer_entries(whole))}
    for name, kind in kinds.items():
        if kind.read is not None and (own := strip(entries, kind.prefixes[0])):
            parts[name] = kind.read(own, path)
    if of_vae := without_prefix(entries, VAES):
        parts["vae"] = Part(autoencoder_config(), f"the autoencoder in {path}", lambda: vae_entries(of_vae))
    return parts


def _blocks_config(entries: Entries, path: str, *, head: int, model: str) -> dict[str, Any]:
    """What the shapes of a file say about its blocks. UserError for heads of other than `head` channels."""
    width, found = shape_of(entries, "img_in.weight", path)[0], shape_of(entries, _FIRST, path)[0]
    if found != head:
        raise UserError(
            f"{path}: the heads of its transformer have {found} channels, where {model}'s have "
            f"{head}; a file does not hold its configuration, so such a model must be given as "
            "a diffusers folder"
        )
    return {
        "num_layers": count_of(entries, "double_blocks"),
        "num_single_layers": count_of(entries, "single_blocks"),
        "num_attention_heads": width // head,
        "joint_attention_dim": shape_of(entries, "txt_in.weight", path)[1],
    }


def _transformer_config(entries: Entries, path: str) -> dict[str, Any]:
    config = configurations()["transformer"]
    return {
        **config,
        **_blocks_config(entries, path, head=config["attention_head_dim"], model="FLUX.1"),
        "pooled_projection_dim": shape_of(entries, "vector_in.in_layer.weight", path)[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in entries,
    }


def _chroma_config(entries: Entries, path: str) -> dict[str, Any]:
    config = chroma_configurations()["transformer"]
    hidden, channels = shape_of(entries, f"{_APPROXIMATOR}.in_proj.weight", path)
    return {
        **config,
        **_blocks_config(entries, path, head=config["attention_head_dim"], model="Chroma"),
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": count_of(entries, rf"{_APPROXIMATOR}\.layers"),
    }


def _clip_of_file(entries: Entries, path: str) -> Part:
    inner = {name.removeprefix("text_model."): entry for name, entry in entries.items()}
    width = shape_of(inner, "embeddings.token_embedding.weight", path)[1]
    config = configurations()["text_encoder"] | {
        "hidden_size": width,
        "intermediate_size": shape_of(inner, "encoder.layers.0.mlp.fc1.weight", path)[0],
        "num_hidden_layers": count_of(inner, r"encoder\.layers"),
        "num_attention_heads": max(1, width // _CLIP_HEAD),
    }
    layers = config["num_hidden_layers"]
    return Part(config, f"the text encoder in {path}", lambda: text_encoder_entries(entries, layers=layers))


def _t5_of_file(entries: Entries, path: str) -> Part:
    found = _t5_entries(entries)
    vocabulary, width = shape_of(found, "shared.weight", path)
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shape_of(found, f"{attention}.relative_attention_bias.weight", path)
    config = configurations()["text_encoder_2"] | {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape_of(found, f"{attention}.q.weight", path)[0] // heads,
        "d_ff": shape_of(found, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", path)[0],
        "num_layers": count_of(found, r"encoder\.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
    return Part(config, f"T5 in {path}", lambda: found)


def _t5_entries(entries: Entries) -> dict[str, TensorEntry]:
    """The encoder, with its table of tokens under one name; a decoder beside it is left out."""
    found = {name: entry for name, entry in entries.items() if not name.startswith(("decoder.", "lm_head."))}
    tied = found.pop(_T5_TIED, None)
    return found if tied is None else {"shared.weight": tied, **found}


AUTOENCODER = PartFiles(folder="vae", title="vae", in_folder=lambda entries, config: vae_entries(entries))
"""FLUX.1's, which other models have as well."""
PARTS = {
    "denoiser": PartFiles(folder="transformer", title="transformer"),
    "vae": AUTOENCODER,
    "text_encoder": PartFiles(
        folder="text_encoder",
        title="text encoder",
        in_folder=lambda entries, config: text_encoder_entries(entries, layers=config["num_hidden_layers"]),
        noun="the text encoder CLIP-L",
        marks=("embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        prefixes=(_CLIP, ""),
        read=_clip_of_file,
    ),
    "text_encoder_2": PartFiles(
        folder="text_encoder_2",
        title="text encoder 2",
        in_folder=lambda entries, config: _t5_entries(entries),
        noun="the text encoder T5",
        marks=("encoder.block.0.layer.0.SelfAttention.q.weight",),
        prefixes=(_T5, ""),
        read=_t5_of_file,
    ),
}
CHROMA_PARTS = {
    "denoiser": PARTS["denoiser"],
    "vae": AUTOENCODER,
    "text_encoder": replace(PARTS["text_encoder_2"], folder="text_encoder", title="text encoder"),
}


def autoencoder_config() -> Config:
    """Of the autoencoder where neither a folder nor a configuration beside its file tells."""
    config: Config = configurations()["vae"]
    return config


def t5_tokenizer(base: BaseModel, path: str | None) -> Path | None:
    """The folder with T5's tokenizer.json: that --t5_tokenizer_path names, else the base's own, if it has one.
    UserError if there is none where the option says."""
    if not path:
        return base.tokenizer_2
    location = Path(path).expanduser()
    if location.name == "tokenizer.json":
        location = location.parent
    # of the folders of Stable Diffusion 3, FLUX.1 and Chroma
    for folder in (location, location / "tokenizer_3", location / "tokenizer_2", location / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise UserError(f"--t5_tokenizer_path {path}: there is no tokenizer.json in it")
