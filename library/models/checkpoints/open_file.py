"""Finds the files of a model from a path or a hub id, and puts another VAE into a model."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from library.errors import UserError, nearest_path
from library.files.json_text import Config
from library.models.checkpoints.base_model import ASSETS, BaseModel, Part, read_json
from library.models.checkpoints.folder import vae_part
from library.models.checkpoints.hub import fetch
from library.models.checkpoints.single_file import vae_part_of_file

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_VAE_OF = {"sd": "sd1.json", "sdxl": "sdxl.json"}  # where the base model has none itself


def open_vae(path: str, *, default_config: Config) -> Part:
    """A VAE of its own. A file without a config.json beside it is taken to be configured as the base model's."""
    location = locate(path)
    if location.is_dir():
        folder = location if (location / "config.json").is_file() else location / "vae"
        if not (folder / "config.json").is_file():
            raise UserError(f"{path}: no folder of a VAE: there is no config.json in it nor in {folder}")
        return vae_part(folder)
    beside = location.parent / "config.json"
    config = read_json(beside) if beside.is_file() else {}
    return vae_part_of_file(location, config if config.get("_class_name") == "AutoencoderKL" else default_config)


def locate(path: str) -> Path:
    """The file or folder that a path or a hub id names; a hub id is fetched."""
    found = Path(path).expanduser()
    if os.path.exists(found):
        return found
    if (
        _HUB_ID.fullmatch(path)
        and not os.path.exists(found.parent)
        and found.suffix not in (".safetensors", ".ckpt", ".pt")
    ):
        return fetch(path)
    raise UserError(f"{path}: no such file or folder{nearest_path(found)}")


def with_vae(base: BaseModel, path: str, *, option: str = "vae", usual: Config | None = None) -> BaseModel:
    """The base model with another VAE: a diffusers folder, one that holds a folder vae, or a file in either naming.

    usual: its configuration where nothing tells one, not even the base's own VAE; None: as `_VAE_OF` has it.
    """
    if "vae" in base.parts:
        usual = base.parts["vae"].config
    elif usual is None:
        usual = read_json(ASSETS / _VAE_OF[base.kind])["vae"]
    try:
        part = open_vae(path, default_config=usual)
        part.entries()
    except UserError as error:
        raise UserError(f"--{option} {error}") from None
    return replace(base, parts={**base.parts, "vae": part})
