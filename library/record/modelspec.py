"""Stability's `modelspec.*`, the part of a saved file's metadata about its kind, its base and its author."""

from __future__ import annotations

import base64
import mimetypes
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path

from library.errors import UserError, why_not

_LORA, _EMBEDDING = "lora", "textual-inversion"
_LONGEST_SHOWN = 200  # characters of a value in a message


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Stability's `modelspec.*`, version 1.0.1. None is left out."""

    architecture: str  # of the base: "stable-diffusion-v1"; "/lora" is added, or "/textual-inversion"
    title: str
    resolution: tuple[int, int]
    prediction_type: str  # "epsilon" or "v_prediction"; another is left out: the specification knows none
    implementation: str = "diffusers"  # whose names the tensors have
    implementation_version: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: str | None = None
    usage_hint: str | None = None
    thumbnail: str | None = None  # a data URL
    merged_from: str | None = None
    trigger_phrase: str | None = None
    preprocessor: str | None = None
    is_negative_embedding: str | None = None
    timestep_range: tuple[int, int] | None = None
    encoder_layer: int | None = None  # clip skip
    is_embedding: bool = False  # and no LoRA


def spec_metadata(spec: ModelSpec, *, now: float) -> dict[str, str]:
    """`modelspec.*`, dated `now` (Unix time) in local time."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name != "is_embedding"}
    values["sai_model_spec"] = "1.0.1"
    values["architecture"] = f"{spec.architecture}/{_EMBEDDING if spec.is_embedding else _LORA}"
    values["resolution"] = f"{spec.resolution[0]}x{spec.resolution[1]}"
    values["prediction_type"] = {"epsilon": "epsilon", "v_prediction": "v"}.get(spec.prediction_type)
    values["date"] = datetime.fromtimestamp(int(now)).isoformat()
    if spec.timestep_range is not None:
        values["timestep_range"] = f"{spec.timestep_range[0]},{spec.timestep_range[1]}"
    return {f"modelspec.{key}": str(value) for key, value in values.items() if value is not None}


def of_embedding(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a LoRA's file for the file of the embedding that is trained beside it."""
    key = "modelspec.architecture"
    found = dict(metadata)
    if key in found:
        found[key] = f"{found[key].removesuffix(_LORA)}{_EMBEDDING}"
    return found


def data_url(thumbnail: str) -> str:
    """A `data:` URL as it is, an image file as one."""
    if thumbnail.startswith("data:"):
        return thumbnail
    path = Path(thumbnail)
    if not os.path.isfile(path):
        raise UserError(f"--metadata_thumbnail: {_shortened(thumbnail)} is neither a file nor a data URL")
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--metadata_thumbnail {thumbnail}: cannot be read: {why_not(error)}") from error
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
