"""The parts of Stable Diffusion 3 and 3.5 on disk: a diffusers folder, a file in the original layout with or without
text encoders, and text encoders and a VAE in files of their own, as kohya's users have them. No weight is read here:
configurations follow from names and shapes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files.index import read_index
from library.files.json_text import Config
from library.files.scaled_fp8 import with_scales
from library.models.checkpoints import flux_files
from library.models.checkpoints.base_model import ASSETS, BaseModel, Part, read_json
from library.models.checkpoints.checkpoint import projected_text_encoder_entries, strip, vae_entries
from library.models.checkpoints.detect import SD3_PREFIXES
from library.models.checkpoints.flux_files import AUTOENCODER, VAES
from library.models.checkpoints.part_files import Entries, PartFiles, parts_in, without_prefix
from library.models.checkpoints.sd3.names import in_original_order, transformer_entries
from library.models.checkpoints.shapes import count_of, shape_of

_CLIP_G = "text_encoders.clip_g.transformer."
_HEAD = 64  # channels of a head, of the transformer and of CLIP
_PATCH = 2  # latent cells of a token's side
_TEXT = "text_model.embeddings.token_embedding.weight"


def configurations() -> dict[str, Any]:
    """Of Stable Diffusion 3.5 medium, by the folders that diffusers has for its parts."""
    own, flux, sdxl = (read_json(ASSETS / f"{name}.json") for name in ("sd3", "flux", "sdxl"))
    return {
        "transformer": own["transformer"],
        "vae": flux["vae"] | own["vae"],
        "text_encoder": flux["text_encoder"],
        "text_encoder_2": sdxl["text_encoder_2"],
        "text_encoder_3": flux["text_encoder_2"],
    }


def vae_config() -> Config:
    """Of the VAE where neither a folder nor a configuration beside its file tells."""
    config: Config = configurations()["vae"]
    return config


def open_sd3(path: str, location: Path, *, kind: str) -> BaseModel:
    """The parts that a folder or a file holds; those in files of their own are put in by `with_part`. UserError for a
    model of other sizes than the layout can have."""
    parts = parts_in(location, PARTS) if location.is_dir() else _of_file(path, read_index(location).entries)
    tokenizer, third = location / "tokenizer", location / "tokenizer_3"
    return BaseModel(
        kind,
        path,
        location,
        parts,
        tokenizer=tokenizer if (tokenizer / "vocab.json").is_file() else ASSETS / "clip_tokenizer",
        tokenizer_2=third if (third / "tokenizer.json").is_file() else None,
    )


def _of_file(path: str, entries: Entries) -> dict[str, Part]:
    entries = with_scales(path, entries)
    whole = without_prefix(
        {name: entry for name, entry in entries.items() if not name.startswith(("text_encoders.", *VAES))}, SD3_PREFIXES
    )
    config = _transformer_config(whole, path)
    parts = {"denoiser": Part(config, f"the transformer in {path}", lambda: transformer_entries(whole))}
    for name, kind in PARTS.items():
        prefix = kind.prefixes[0]
        if prefix and kind.read is not None and (own := strip(entries, prefix)):
            parts[name] = kind.read(own, path)
    if of_vae := without_prefix(entries, VAES):
        parts["vae"] = Part(vae_config(), f"the VAE in {path}", lambda: vae_entries(of_vae))
    return parts


def _transformer_config(entries: Entries, path: str) -> dict[str, Any]:
    """From the names and shapes of a file in the original layout."""
    _, places, width = shape_of(entries, "pos_embed", path)
    if width % _HEAD or math.isqrt(places) ** 2 != places:
        raise UserError(
            f"{path}: its transformer of {width} channels and {places} places is not that of Stable Diffusion 3; a "
            "file does not hold its configuration, so such a model must be given as a diffusers folder"
        )
    blocks = count_of(entries, "joint_blocks")
    second = [i for i in range(blocks) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in entries]
    has_norms = "joint_blocks.0.x_block.attn.ln_q.weight" in entries
    return configurations()["transformer"] | {
        "in_channels": shape_of(entries, "x_embedder.proj.weight", path)[1],
        "out_channels": shape_of(entries, "final_layer.linear.weight", path)[0] // _PATCH**2,
        "num_layers": blocks,
        "num_attention_heads": width // _HEAD,
        "joint_attention_dim": shape_of(entries, "context_embedder.weight", path)[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": shape_of(entries, "y_embedder.mlp.0.weight", path)[1],
        "pos_embed_max_size": math.isqrt(places),
        "dual_attention_layers": second,
        "qk_norm": "rms_norm" if has_norms else None,
    }


def _clip_g_of_file(entries: Entries, path: str) -> Part:
    width = shape_of(entries, _TEXT, path)[1]
    config = configurations()["text_encoder_2"] | {
        "hidden_size": width,
        "intermediate_size": shape_of(entries, "text_model.encoder.layers.0.mlp.fc1.weight", path)[0],
        "num_hidden_layers": count_of(entries, r"text_model\.encoder\.layers"),
        "num_attention_heads": max(1, width // _HEAD),
        "projection_dim": shape_of(entries, "text_projection.weight", path)[0],
    }
    layers = config["num_hidden_layers"]
    return Part(
        config, f"the second text encoder in {path}", lambda: projected_text_encoder_entries(entries, layers=layers)
    )


PARTS = {
    "denoiser": PartFiles(
        folder="transformer",
        title="transformer",
        in_folder=lambda entries, config: in_original_order(entries, layers=config["num_layers"]),
    ),
    "vae": AUTOENCODER,
    "text_encoder": flux_files.PARTS["text_encoder"],
    "text_encoder_2": PartFiles(
        folder="text_encoder_2",
        title="second text encoder",
        in_folder=lambda entries, config: projected_text_encoder_entries(entries, layers=config["num_hidden_layers"]),
        noun="the text encoder CLIP-G",
        marks=(_TEXT,),
        prefixes=(_CLIP_G, ""),
        read=_clip_g_of_file,
    ),
    "text_encoder_3": replace(flux_files.PARTS["text_encoder_2"], folder="text_encoder_3", title="text encoder T5"),
}
