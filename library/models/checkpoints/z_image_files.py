"""The parts of Z-Image on disk: a diffusers folder, or the transformer in one file, with text encoder and autoencoder
in the same file or in files of their own. Configurations follow from names and shapes; no weight is read here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files.index import read_index
from library.files.scaled_fp8 import with_scales
from library.models.checkpoints.base_model import ASSETS, BaseModel, Part, read_json
from library.models.checkpoints.checkpoint import strip, vae_entries
from library.models.checkpoints.detect import Z_IMAGE_PREFIXES
from library.models.checkpoints.flux_files import AUTOENCODER, VAES, autoencoder_config
from library.models.checkpoints.part_files import (
    Entries,
    PartFiles,
    parts_in,
    tokenizer_in,
    without_prefix,
)
from library.models.checkpoints.parts.qwen3_files import qwen3_files, qwen3_of_file
from library.models.checkpoints.shapes import count_of, shape_of
from library.models.checkpoints.z_image_names import transformer_entries

_QWEN = "text_encoders.qwen3_4b.transformer."
_NORM = "layers.0.attention.norm_q.weight"
_PATCH = 4  # latent cells of a token


def configurations() -> dict[str, Any]:
    """Of the true model, by the folders that diffusers has for its parts; without FLUX.1's autoencoder."""
    return read_json(ASSETS / "z_image.json")


PARTS = {
    "denoiser": PartFiles(folder="transformer", title="transformer"),
    "vae": AUTOENCODER,
    "text_encoder": qwen3_files(
        "the text encoder Qwen3-4B", lambda: configurations()["text_encoder"], prefixes=(_QWEN, "")
    ),
}


def open_z_image(path: str, location: Path, *, kind: str) -> BaseModel:
    """The parts that a folder or a file holds; those in files of their own are put in later. UserError for a model of
    other sizes than the layout can have."""
    parts = _of_folder(location) if location.is_dir() else _of_file(path, read_index(location).entries)
    return BaseModel(kind, path, location, parts, tokenizer=tokenizer_in(location / "tokenizer") or Path())


def _of_folder(folder: Path) -> dict[str, Part]:
    found = parts_in(folder, PARTS)
    config = found["denoiser"].config
    if config.get("siglip_feat_dim") is not None:
        raise UserError(f"{folder / 'transformer'}: is given images as well (SigLIP), which is not supported")
    sizes = (config.get("all_patch_size", [2]), config.get("all_f_patch_size", [1]))
    if tuple(map(list, sizes)) != ([2], [1]):
        raise UserError(f"{folder / 'transformer'}: has patches of {sizes[0]} latent cells, where Z-Image has 2")
    return found


def _of_file(path: str, entries: Entries) -> dict[str, Part]:
    entries = with_scales(path, entries)
    inner = without_prefix(
        {name: entry for name, entry in entries.items() if not name.startswith(("text_encoders.", *VAES))},
        Z_IMAGE_PREFIXES,
    )
    found = transformer_entries(inner)
    parts = {"denoiser": Part(_transformer_config(found, path), f"the transformer in {path}", lambda: found)}
    if own := strip(entries, _QWEN):
        parts["text_encoder"] = qwen3_of_file(own, path, usual=configurations()["text_encoder"])
    if of_vae := without_prefix(entries, VAES):
        parts["vae"] = Part(autoencoder_config(), f"the autoencoder in {path}", lambda: vae_entries(of_vae))
    return parts


def _transformer_config(entries: Entries, path: str) -> dict[str, Any]:
    """From the shapes of a file, under diffusers' names."""
    config = configurations()["transformer"]
    (width, inputs), (head,) = shape_of(entries, "all_x_embedder.2-1.weight", path), shape_of(entries, _NORM, path)
    if head != sum(config["axes_dims"]):
        raise UserError(
            f"{path}: the heads of its transformer have {head} channels, where Z-Image's have "
            f"{sum(config['axes_dims'])}; a file does not hold its configuration, so such a model must be given as a "
            "diffusers folder"
        )
    return config | {
        "in_channels": inputs // _PATCH,
        "dim": width,
        "n_layers": count_of(entries, "layers"),
        "n_refiner_layers": count_of(entries, "noise_refiner"),
        "n_heads": width // head,
        "n_kv_heads": width // head,
        "cap_feat_dim": shape_of(entries, "cap_embedder.0.weight", path)[0],
    }
