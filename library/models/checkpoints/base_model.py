"""A base model on disk: where its parts are and how they are configured. No weight is read here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.errors import UserError, nearest_path, why_not
from library.files.json_text import parse_json
from library.files.tensors import TensorEntry

ASSETS = Path(__file__).parents[1] / "assets"
# A noise schedule that ends in pure noise. A drawing must begin at the last timestep then, or it begins where there is
# signal (arXiv 2305.08891, §3.3)
ZERO_TERMINAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
_VAE_OF = {"sd": "sd1.json", "sdxl": "sdxl.json"}  # where the base model has none itself
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Part:
    """One module of a base model.

    config: what diffusers or transformers build it from. where: names it in errors. entries: reads the table of its
    weights, under the module's own names.
    """

    config: Mapping[str, Any]
    where: str
    entries: Callable[[], Mapping[str, TensorEntry]]


@dataclass(frozen=True)
class BaseModel:
    """Everything that a family needs to know before it loads weights.

    kind: the family's name. path: as the user gave it. location: where it lies. parts: by "unet", "vae",
    "text_encoder" and, where there are two, "text_encoder_2"; a folder or file without a VAE has none. scheduler: the
    configuration of the noise schedule. tokenizer, tokenizer_options: the (first) text encoder's folder and what to
    change in it. prediction: "epsilon" or "v_prediction" where the model says so itself, else None. prediction_from:
    what says so.
    """

    kind: str
    path: str
    location: Path
    parts: Mapping[str, Part]
    scheduler: Mapping[str, Any]
    tokenizer: Path
    tokenizer_options: Mapping[str, Any]
    prediction: str | None
    prediction_from: str

    def with_vae(self, path: str) -> BaseModel:
        """The same with another VAE: a diffusers folder, one that holds a folder vae, or a file in either naming."""
        default = self.parts["vae"].config if "vae" in self.parts else read_json(ASSETS / _VAE_OF[self.kind])["vae"]
        try:
            part = open_vae(path, default_config=default)
            part.entries()
        except UserError as error:
            raise UserError(f"--vae {error}") from None
        return replace(self, parts={**self.parts, "vae": part})


def open_base_model(path: str) -> BaseModel:
    """Recognise a file, a diffusers folder or a hub id. UserError names the nearest existing path otherwise."""
    location = locate(path)
    if location.is_dir():
        from library.models.checkpoints.folder import open_folder

        return open_folder(path, location)
    from library.models.checkpoints.single_file import open_file

    return open_file(path, location)


def open_vae(path: str, *, default_config: Mapping[str, Any]) -> Part:
    """A VAE of its own. A file without a config.json beside it is taken to be configured as the base model's."""
    location = locate(path)
    if location.is_dir():
        from library.models.checkpoints.folder import vae_part

        folder = location if (location / "config.json").is_file() else location / "vae"
        if not (folder / "config.json").is_file():
            raise UserError(f"{path}: no folder of a VAE: there is no config.json in it nor in {folder}")
        return vae_part(folder)
    from library.models.checkpoints.single_file import vae_part_of_file

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
        from library.models.checkpoints.hub import fetch

        return fetch(path)
    raise UserError(f"{path}: no such file or folder{nearest_path(found)}")


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object. UserError where it is missing or is none."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{nearest_path(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {why_not(error)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} where a table is expected")
    return content


def few(names: Iterable[str], count: int = 5) -> str:
    """The first names of a list, for messages."""
    listed = sorted(names)
    return ", ".join(listed[:count]) + (", …" if len(listed) > count else "")
