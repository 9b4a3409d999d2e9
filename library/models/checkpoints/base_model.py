"""A base model on disk: where its parts are and how they are configured. No weight is read here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from library.errors import UserError, nearest_path, why_not
from library.files.json_text import Config, parse_json
from library.files.tensors import TensorEntry

ASSETS = Path(__file__).parents[1] / "assets"
# A noise schedule that ends in pure noise. Sampling must then begin at the last timestep: at an earlier one there is
# signal (arXiv 2305.08891, §3.3)
ZERO_TERMINAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@dataclass(frozen=True)
class Part:
    """One module of a base model.

    config: the configuration that diffusers or transformers build it from. where: its name in errors. entries: reads
    the table of its weights, under the module's own names. absent: whether it lies nowhere, so that only the usual
    configuration is known (see `library.models.opening.open_family`).
    """

    config: Config
    where: str
    entries: Callable[[], Mapping[str, TensorEntry]]
    absent: bool = False


@dataclass(frozen=True)
class Folder:
    """A folder that may hold a model, as diffusers writes one: a folder for each part, with its config.json."""

    path: Path

    @cached_property
    def pipeline(self) -> str:
        """The class that its model_index.json names; "" where there is none."""
        index = self.path / "model_index.json"
        return str(read_json(index).get("_class_name", "")) if index.is_file() else ""

    def config(self, part: str) -> dict[str, Any] | None:
        """The configuration in a part's folder; None where there is none."""
        file = self.path / part / "config.json"
        return read_json(file) if file.is_file() else None


@dataclass(frozen=True)
class BaseModel:
    """The facts about a base model that a family needs before it loads weights.

    kind: the family's name. path: as the user gave it. location: where it lies. parts: by "denoiser", "vae",
    "text_encoder" and, where there are two, "text_encoder_2"; a folder or file without a VAE has none. scheduler: the
    configuration of the noise schedule. tokenizer, tokenizer_options: the (first) text encoder's folder and changes to
    its options. prediction: "epsilon" or "v_prediction" if the model states it, else None. prediction_from: the place
    that states it. tokenizer_2: the folder of T5's, where the model has one.
    """

    kind: str
    path: str
    location: Path
    parts: Mapping[str, Part]
    scheduler: Config = field(default_factory=dict)
    tokenizer: Path = Path()
    tokenizer_options: Config = field(default_factory=dict)
    prediction: str | None = None
    prediction_from: str = ""
    tokenizer_2: Path | None = None


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object. UserError if the file is missing or holds something else."""
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
