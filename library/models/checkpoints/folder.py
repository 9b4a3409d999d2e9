"""Base models as diffusers folders: one folder a part, each with its config.json and weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from library.errors import UserError, nearest_path
from library.files.index import read_index
from library.files.json_text import Config
from library.files.tensors import TensorEntry
from library.models.checkpoints.base_model import ASSETS, BaseModel, Folder, Part, few, read_json
from library.models.checkpoints.checkpoint import TEXT_PREFIXES, text_entries_of, vae_entries
from library.models.checkpoints.detect import TITLES, FileKind, is_v2, not_a_base, other_family

logger = logging.getLogger(__name__)

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?\.(?P<format>safetensors|bin)"
    r"(?:\.index(?:\.(?P<late_variant>\w+))?\.json)?"
)
_PREDICTIONS = ("epsilon", "v_prediction")
_OTHER_SCHEDULES = ("EDM", "FlowMatch")  # beginnings of classes without betas and timesteps 0 … 999


def open_folder(path: str, folder: Path, *, kind: str) -> BaseModel:
    """Read the configurations in the diffusers folder of a model of the family "sd" or "sdxl". Raises UserError."""
    unet = read_json(folder / "unet" / "config.json")
    _require(unet, folder / "unet", cross_attention_dim=int, block_out_channels=list)
    parts = {"denoiser": Part(unet, _where("UNet", folder / "unet"), lambda: entries_in(folder / "unet"))}
    parts |= {part: _text_encoder_part(folder / part) for part in TEXT_PREFIXES[kind]}
    if (folder / "vae" / "config.json").is_file():
        parts["vae"] = vae_part(folder / "vae")
    schedule = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(schedule)
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise UserError(f"{schedule}: prediction_type is '{prediction}'; supported are {' and '.join(_PREDICTIONS)}")
    if (name := str(scheduler.get("_class_name", ""))).startswith(_OTHER_SCHEDULES):
        raise UserError(f"{schedule}: a model of another kind ({name}), which is not supported")
    return BaseModel(kind, path, folder, parts, scheduler, *_tokenizer(folder, unet), prediction, str(schedule))


def not_a_model(path: str, folder: Folder) -> UserError:
    """The error for a folder that no family claims."""
    if kind := other_family(folder):
        return UserError(f"{path} is {not_a_base(FileKind(kind, TITLES[kind]))}")
    return UserError(
        f"{path}: no diffusers folder of a Stable Diffusion model; {_contents(folder.path, folder.pipeline)}"
    )


def vae_part(folder: Path) -> Part:
    """The VAE in a folder of its own."""
    config = read_json(folder / "config.json")
    _require(config, folder, block_out_channels=list)
    if (kind := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise UserError(f"{folder}: an {kind}, where Stable Diffusion needs an AutoencoderKL")
    return Part(config, _where("VAE", folder), lambda: vae_entries(entries_in(folder)))


def choose_weights(names: Iterable[str]) -> str | None:
    """Of a folder's files, the one that holds or lists the weights: full precision first, safetensors before bin."""
    found = [match for name in names if (match := _WEIGHTS.fullmatch(name))]

    def rank(match: re.Match[str]) -> tuple[int, bool, bool]:
        variant = match["variant"] or match["late_variant"]
        # non_ema holds the weights before averaging, from which no one samples
        order = {None: 0, "fp16": 1, "bf16": 2, "non_ema": 9}.get(variant, 5)
        return order, match["format"] == "bin", match[0].endswith(".json")

    return min(found, key=rank)[0] if found else None


def shards_of(index: str, names: Iterable[str]) -> list[str]:
    """Of a folder's files, the shards that an index such as model.safetensors.index.fp16.json lists."""
    match = _WEIGHTS.fullmatch(index)
    assert match, index
    variant = match["variant"] or match["late_variant"]
    begin = index.split(".")[0] + (f".{variant}-" if variant else "-")
    return [name for name in names if name.startswith(begin) and name.endswith(f".{match['format']}")]


def entries_in(folder: Path) -> dict[str, TensorEntry]:
    """The tensors in a part's folder, from one file or from the shards that an index lists."""
    name = choose_weights(path.name for path in folder.iterdir())
    if name is None:
        raise UserError(f"{folder}: holds no weights, but {few(p.name for p in folder.iterdir()) or 'nothing'}")
    logger.debug("weights of %s: %s", folder, name)
    if not name.endswith(".json"):
        return dict(read_index(folder / name).entries)
    shards = read_json(folder / name).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
        raise UserError(f"{folder / name}: its weight_map is no table of files in the same folder")
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise UserError(f"{folder / name}: lists {shard}, which is missing{nearest_path(folder / shard)}")
        entries.update(read_index(folder / shard).entries)
    return entries


def _text_encoder_part(folder: Path) -> Part:
    config = read_json(folder / "config.json")
    _require(config, folder, hidden_size=int, num_hidden_layers=int)
    layers, entries = config["num_hidden_layers"], text_entries_of(folder.name)
    return Part(config, _where("text encoder", folder), lambda: entries(entries_in(folder), layers=layers))


def _tokenizer(folder: Path, unet: Config) -> tuple[Path, dict[str, Any]]:
    """The folder's own tokenizer, or the shipped vocabulary, which is every Stable Diffusion model's."""
    own = folder / "tokenizer"
    if (own / "vocab.json").is_file() or (own / "tokenizer.json").is_file():
        return own, {}
    logger.info("%s has no tokenizer; CLIP's own vocabulary is used", folder)
    asset = "sdxl" if unet.get("addition_embed_type") == "text_time" else "sd2" if is_v2(unet) else "sd1"
    return ASSETS / "clip_tokenizer", read_json(ASSETS / f"{asset}.json")["tokenizer"]


def _require(config: Config, folder: Path, **keys: type) -> None:
    """`keys`: a whole number, or a list of at most ten."""
    place = folder / "config.json"
    for key, kind in keys.items():
        if key not in config:
            raise UserError(f"{place}: has no '{key}', which a Stable Diffusion model's has")
        numbers = config[key] if kind is list else [config[key]]
        if not isinstance(numbers, list) or not 1 <= len(numbers) <= 10 or any(type(n) is not int for n in numbers):
            raise UserError(f"{place}: its '{key}' is {str(config[key])[:50]}, which no model has")


def _where(part: str, folder: Path) -> str:
    return f"the {part} in {folder}"


def _contents(folder: Path, pipeline: str) -> str:
    if (folder.parent / "unet" / "config.json").is_file():
        return f"it is one part of one: give {folder.parent}"
    if pipeline and not pipeline.startswith("StableDiffusion"):
        return f"its model_index.json names a {pipeline}"
    files = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt")]
    if files:
        return f"to use a single file, give its path: {few(str(folder / name) for name in files)}"
    return f"there is no unet/config.json in it, but {few(path.name for path in folder.iterdir()) or 'nothing'}"
