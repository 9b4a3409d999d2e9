"""Adapter files, without a model: reading them in whatever naming, checking and writing them."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.files.atomic import replacing
from library.files.hashes import UNKNOWN_HASHES, write_hashes
from library.files.header import read_metadata
from library.files.index import read_index
from library.models.checkpoints.adapter_file import (
    AdapterContents,
    Naming,
    describe,
    is_of_embedding,
    kind_of_layer,
)
from library.models.checkpoints.detect import kind_of_file
from networks import kinds
from networks.load_report import by_module
from networks.naming import read_config, to_kohya

logger = logging.getLogger(__name__)

_WHOLE_NUMBERS = (
    ".alpha",
    ".on_input",
    ".bias_indices",
    ".bias_size",
    ".vera_projection",
)  # ends of names that may hold them


class AdapterLayer(NamedTuple):
    """kind: a key of `networks.kinds.KINDS` or of the kinds that `adapter_file` knows by name; "" for another.
    tensors: by the names behind the layer's, "lora_down.weight"."""

    kind: str
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file, on the CPU.

    source: where it comes from, for messages. layers: by their names in kohya's naming, `lora_unet_…`, whatever naming
    the file has. embeddings: tensors of textual inversion embeddings beside the layers. metadata: of the file itself.
    """

    source: str
    layers: Mapping[str, AdapterLayer]
    naming: Naming | None = "kohya"
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], source: str) -> AdapterFile:
        """Tensors in kohya's names as if they had been read from `source`."""
        return cls(source, _layers(tensors))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the layers in kohya's names, `lora_unet_….lora_down.weight`."""
        return {f"{name}.{end}": tensor for name, layer in self.layers.items() for end, tensor in layer.tensors.items()}


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, AdapterLayer]:
    more = kinds.tensor_names()
    return {
        name: AdapterLayer(kind_of_layer({end: tuple(t.shape) for end, t in own.items()}, more=more), own)
        for name, own in by_module(tensors).items()
    }


def read(
    file: str | Path, *, purpose: str = "", allowed: Collection[str] | None = None, keep_embeddings: bool = False
) -> AdapterFile:
    """Read an adapter file, whatever its naming.

    Embeddings beside the layers are left out with a warning, unless they are to be kept. `UserError` if it is no such
    file, or, where a `purpose` is given, if it holds other kinds of layers than those `allowed` (None: all of ours);
    the purpose ends that sentence: "and only plain LoRA {purpose}".
    """
    path = Path(file)
    contents, tensors = check(path, purpose=purpose, allowed=allowed), read_tensors(path)
    embeddings = {name: tensor for name, tensor in tensors.items() if is_of_embedding(name)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in embeddings}
    if embeddings and not keep_embeddings:
        words = ", ".join(contents.embeddings)
        logger.warning("%s: textual inversion embeddings beside the LoRA are left out: %s", path, words)
        embeddings = {}
    metadata = read_metadata(path)
    if contents.naming != "kohya":
        config = _config_of(path, metadata)
        alphas = "the alphas of its configuration" if config else "alpha = rank, since it has none"
        if any(name.endswith(".alpha") for name in tensors):
            alphas = "its own alphas"
        tensors = to_kohya(tensors, config=config, source=str(path))
        logger.info("%s: names in %s's style, read with %s", path, contents.naming, alphas)
    return AdapterFile(str(file), _layers(tensors), contents.naming, embeddings, metadata)


def check(file: str | Path, *, purpose: str = "", allowed: Collection[str] | None = None) -> AdapterContents:
    """Check the content of an adapter file by its header alone, before any model is loaded. Raises as `read` does."""
    path = Path(file)
    index = read_index(path)
    found = kind_of_file(index)
    if found.adapter is None:
        raise UserError(f"{path} is {found.title}, and no LoRA")
    shapes = {name: entry.shape for name, entry in index.entries.items()}
    adapter = describe(shapes, index.metadata, more=kinds.tensor_names()) or found.adapter
    allowed = tuple(kinds.KINDS if allowed is None else allowed)
    if purpose and not adapter.holds_only({read for kind in allowed for read in kinds.load(kind).reads()}):
        nouns = " or ".join(dict.fromkeys(kinds.load(kind).NOUN for kind in allowed))
        advice = f". LyCORIS trains it: {adapter.made_by}" if adapter.made_by and "train" in purpose else ""
        raise UserError(f"{path} is {adapter.title}, and only {nouns} {purpose}{advice}")
    if adapter.naming is None:
        raise UserError(
            f"{path} is {adapter.title}, whose names no known program writes, such as {min(index.entries)!r}"
        )
    if adapter.naming != "kohya" and not adapter.is_plain:
        raise UserError(f"{path} is {adapter.title}: names in {adapter.naming}'s style are read in plain LoRA only")
    for name, entry in index.entries.items():
        if not entry.count:
            raise UserError(f"{path}: {name} has the shape {list(entry.shape)}: it holds nothing")
        if "float" not in entry.dtype and not name.endswith(_WHOLE_NUMBERS):
            raise UserError(f"{path}: {name} holds {entry.dtype}, which are no weights")
    if adapter.naming == "kohya":
        _refuse_halves(path, shapes)
    return adapter


def _refuse_halves(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """`UserError` for a layer that has some of the tensors of its kind, one of ours, and not all."""
    readers, more = kinds.readers(), kinds.tensor_names()
    for module, own in by_module(shapes).items():
        kind = readers.get(kind_of_layer(own, more=more))
        if kind is not None and (lacking := kind.lacking(own)) is not None:
            present = min(set(kind.NAMES) & own.keys())
            raise UserError(f"{path}: {module} has a {present} and no {lacking}")


def _config_of(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The scale settings of a file of diffusers or PEFT, from its metadata or the file beside it."""
    if (text := metadata.get("lora_adapter_metadata")) is not None:
        return read_config(text, f"{path}: lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    return read_config(beside.read_text(encoding="utf-8"), str(beside)) if beside.is_file() else None


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter file, whatever their names, on the CPU. Pickled files may hold tensors only."""
    path = Path(file)
    read_index(path)  # refuses what is damaged or malicious, in plain words and without much memory
    try:
        tensors = load_file(path) if _is_safetensors(path) else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: it holds more than tensors; nothing in it was run") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: cannot be read as an adapter file: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path}: is not a flat table of tensors, as adapter files are")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all() and not _is_idle_alpha(name, tensors):
            raise UserError(f"{path}: {name} holds NaN or infinity: the run that wrote it had diverged")
    return tensors


def _is_idle_alpha(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is the alpha of a LoKr with two whole factors, where it has no effect: LyCORIS writes the rank, and an
    enormous rank, which means "whole", is infinity in fp16."""
    layer, _, end = name.rpartition(".")
    return end == "alpha" and f"{layer}.lokr_w1" in tensors and f"{layer}.lokr_w2" in tensors


def _is_safetensors(path: Path) -> bool:
    """By content: behind the length of the header comes its table."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file whole or not at all, with its true hashes in the metadata. Raises UserError."""
    with replacing(path) as beside:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside, {**metadata, **UNKNOWN_HASHES})
        write_hashes(beside)
