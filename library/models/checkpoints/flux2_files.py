"""The parts of FLUX.2 klein on disk: a diffusers folder, or the transformer in one file, with text encoder and
autoencoder in the same file or in files of their own. Configurations follow from names and shapes; no weight is read.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files.index import read_index
from library.files.json_text import Config
from library.files.scaled_fp8 import with_scales
from library.files.tensors import TensorEntry
from library.models.checkpoints import checkpoint, z_image_files
from library.models.checkpoints.base_model import ASSETS, BaseModel, Part, read_json
from library.models.checkpoints.detect import FLUX2_PREFIXES
from library.models.checkpoints.flux2_names import transformer_entries
from library.models.checkpoints.flux_files import VAES
from library.models.checkpoints.part_files import (
    Entries,
    PartFiles,
    parts_in,
    tokenizer_in,
    without_prefix,
)
from library.models.checkpoints.parts.qwen3_files import qwen3_files, qwen3_of_file
from library.models.checkpoints.shapes import count_of, shape_of

_QWENS = ("text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_8b.transformer.")
_NORM = "transformer_blocks.0.attn.norm_q.weight"
_MEAN, _COUNT = "bn.running_mean", "bn.num_batches_tracked"
# Names of the original file that diffusers has outside of encoder and decoder
_QUANT = re.compile(r"(?:encoder|decoder)\.(?P<layer>(?:post_)?quant_conv\..+)")
_DISTILLED = re.compile(r"klein(?!.*base)")


def configurations() -> dict[str, Any]:
    """Of the true model of 4 billion parameters, by the folders that diffusers has for its parts; its text encoder is
    Z-Image's."""
    return {"text_encoder": z_image_files.configurations()["text_encoder"], **read_json(ASSETS / "flux2.json")}


def vae_entries(entries: Entries) -> dict[str, TensorEntry]:
    """The autoencoder, in the original layout or diffusers', under diffusers' names. The number of batches that its
    statistics are of is left out."""
    found: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        match = _QUANT.fullmatch(name)
        found[match["layer"] if match else name] = entry
    return {name: entry for name, entry in checkpoint.vae_entries(found).items() if name != _COUNT}


def _vae_of_file(entries: Entries, path: str) -> Part:
    """Of the true model's form, in its own or another width."""
    found = vae_entries(entries)
    blocks = count_of(found, r"encoder\.down_blocks")
    down = [f"encoder.down_blocks.{i}" for i in range(blocks)]
    up = [f"decoder.up_blocks.{i}" for i in reversed(range(blocks))]
    widths = [[shape_of(found, f"{one}.resnets.0.conv1.weight", path)[0] for one in half] for half in (down, up)]
    config = configurations()["vae"] | {
        "latent_channels": shape_of(found, "decoder.conv_in.weight", path)[1],
        "block_out_channels": widths[0],
        "decoder_block_out_channels": widths[1],
        "use_quant_conv": "quant_conv.weight" in found,
        "use_post_quant_conv": "post_quant_conv.weight" in found,
    }
    return Part(config, f"the autoencoder in {path}", lambda: found)


PARTS = {
    "denoiser": PartFiles(folder="transformer", title="transformer"),
    "vae": PartFiles(
        folder="vae",
        title="autoencoder",
        in_folder=lambda entries, config: vae_entries(entries),
        noun="the autoencoder of FLUX.2",
        marks=(_MEAN,),
        prefixes=(*VAES, ""),
        read=_vae_of_file,
    ),
    "text_encoder": qwen3_files(
        "the text encoder Qwen3", lambda: configurations()["text_encoder"], prefixes=(*_QWENS, "")
    ),
}


def open_flux2(path: str, location: Path, *, kind: str) -> BaseModel:
    """The parts that a folder or a file holds; those in files of their own are put in later. UserError for a model of
    other sizes than the layout can have."""
    parts = _of_folder(location) if location.is_dir() else _of_file(path, read_index(location).entries)
    return BaseModel(kind, path, location, parts, tokenizer=tokenizer_in(location / "tokenizer") or Path())


def is_distilled(base: BaseModel) -> bool:
    """Whether a model is distilled to four steps. A folder's model_index.json tells; a file has the shapes of the base,
    and is known by its name: the makers' distilled ones are called klein, and the others klein-base."""
    if base.location.is_dir():
        index = base.location / "model_index.json"
        return index.is_file() and bool(read_json(index).get("is_distilled", False))
    return bool(_DISTILLED.search(Path(base.path).name.lower()))


def _of_folder(folder: Path) -> dict[str, Part]:
    found = parts_in(folder, PARTS)
    config = found["denoiser"].config
    if config.get("guidance_embeds", True):
        raise UserError(f"{folder / 'transformer'}: is told a guidance, as FLUX.2 dev is and no version of klein")
    if config.get("patch_size", 1) != 1:
        raise UserError(f"{folder / 'transformer'}: has patches of {config['patch_size']} cells, where FLUX.2 has 1")
    return found


def _of_file(path: str, entries: Entries) -> dict[str, Part]:
    entries = with_scales(path, entries)
    inner = without_prefix(
        {name: entry for name, entry in entries.items() if not name.startswith(("text_encoders.", *VAES))},
        FLUX2_PREFIXES,
    )
    found = transformer_entries(inner)
    parts = {"denoiser": Part(_transformer_config(found, path), f"the transformer in {path}", lambda: found)}
    if own := without_prefix(entries, _QWENS):
        parts["text_encoder"] = qwen3_of_file(own, path, usual=configurations()["text_encoder"])
    if of_vae := without_prefix(entries, VAES):
        parts["vae"] = _vae_of_file(of_vae, path)
    return parts


def _transformer_config(entries: Entries, path: str) -> Config:
    """From the shapes of a file, under diffusers' names."""
    config = configurations()["transformer"]
    (width, inputs), (head,) = shape_of(entries, "x_embedder.weight", path), shape_of(entries, _NORM, path)
    if head != config["attention_head_dim"]:
        raise UserError(
            f"{path}: the heads of its transformer have {head} channels, where FLUX.2's have "
            f"{config['attention_head_dim']}; a file does not hold its configuration, so such a model must be given as "
            "a diffusers folder"
        )
    found: Config = config | {
        "in_channels": inputs,
        "num_layers": count_of(entries, "transformer_blocks"),
        "num_single_layers": count_of(entries, "single_transformer_blocks"),
        "num_attention_heads": width // head,
        "joint_attention_dim": shape_of(entries, "context_embedder.weight", path)[1],
    }
    return found


def with_few_layers(base: BaseModel, layers: int) -> BaseModel:
    """The model with no more than the first `layers` layers of its text encoder: it reads no state behind them."""
    part = base.parts["text_encoder"]
    count = int(part.config["num_hidden_layers"])
    if count <= layers:
        return base
    late = re.compile(r"layers\.(\d+)\.")
    config = {**part.config, "num_hidden_layers": layers}
    config |= {"layer_types": config["layer_types"][:layers]} if config.get("layer_types") else {}

    def entries() -> dict[str, TensorEntry]:
        found = part.entries().items()
        return {name: e for name, e in found if not (m := late.match(name)) or int(m[1]) < layers}

    return replace(base, parts={**base.parts, "text_encoder": replace(part, config=config, entries=entries)})
