"""Adapter files, without a model: reading them in whatever naming, checking and writing them."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.files.atomic import replacing
from library.files.hashes import UNKNOWN_HASHES, write_hashes
from library.files.header import read_metadata
from library.files.index import read_index
from library.files.tensors import WeightsIndex
from library.models.checkpoints.adapter_file import (
    AdapterContents,
    Naming,
    describe,
    is_of_embedding,
    kind_of_layer,
    short_title,
)
from library.models.checkpoints.detect import kind_of_file
from networks import kinds
from networks.formats.naming import CONFIG_KEY, from_kohya, read_config, to_kohya
from networks.load_report import by_module

if TYPE_CHECKING:
    from networks.adapter import Adapter

logger = logging.getLogger(__name__)

# Axes that are the rank of both tensors; of those that have a Tucker core, the core says which axes are
_SAME_RANK = (
    ("lora_down.weight", 0, "lora_up.weight", 1),
    *((f"hada_w{n}_a", 1, f"hada_w{n}_b", 0) for n in (1, 2)),
    *((f"lokr_w{n}_a", 1, f"lokr_w{n}_b", 0) for n in (1, 2)),
)
_TUCKER = {"hada_w1_a": "hada_t1", "hada_w2_a": "hada_t2", "lokr_w2_a": "lokr_t2"}
# Ends of names that may hold whole numbers
_WHOLE_NUMBERS = (".alpha", ".on_input", ".bias_indices", ".bias_size", ".vera_projection")


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

    def beginning_with(self, *prefixes: str) -> AdapterFile:
        """The layers whose names begin with one of these: those of some parts of a model."""
        return replace(self, layers={name: own for name, own in self.layers.items() if name.startswith(prefixes)})

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
    the purpose ends that sentence: "and only plain LoRA {purpose}", which says what else trains it.
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
        alphas = "the alphas of its configuration" if _config_of(path, metadata) else "alpha = rank, since it has none"
        if any(name.endswith(".alpha") for name in tensors):
            alphas = "its own alphas"
        logger.info("%s: %s, names in %s's style, read with %s", path, contents.title, contents.naming, alphas)
    tensors = _in_our_names(tensors, contents, path, metadata)
    return AdapterFile(str(file), _layers(tensors), contents.naming, embeddings, metadata)


def contents_of(file: str | Path) -> tuple[AdapterContents, WeightsIndex]:
    """The kinds of layers that an adapter file holds, and its table, by its header alone. `UserError` if it is none."""
    path = Path(file)
    index = read_index(path)
    found = kind_of_file(index)
    if found.adapter is None:
        raise UserError(f"{path} is {found.title}, and no LoRA")
    shapes = {name: entry.shape for name, entry in index.entries.items()}
    return describe(shapes, index.metadata, more=kinds.tensor_names()) or found.adapter, index


def check(file: str | Path, *, purpose: str = "", allowed: Collection[str] | None = None) -> AdapterContents:
    """Check the content of an adapter file by its header alone, before any model is loaded. Raises as `read` does."""
    path = Path(file)
    adapter, index = contents_of(path)
    for name, entry in index.entries.items():
        if not entry.count:
            raise UserError(f"{path}: {name} has the shape {list(entry.shape)}: it holds nothing")
        if "float" not in entry.dtype and not name.endswith(_WHOLE_NUMBERS):
            raise UserError(f"{path}: {name} holds {entry.dtype}, which are no weights")
    outline = {
        name: torch.empty(entry.shape, device="meta")
        for name, entry in index.entries.items()
        if not is_of_embedding(name)
    }
    if adapter.naming is None or adapter.unknown:
        _refuse_other_kinds(path, adapter, adapter, purpose, allowed)
    if adapter.naming is None:
        raise UserError(
            f"{path} is {adapter.title}, whose names no known program writes, such as {min(index.entries)!r}"
        )
    shapes = _shapes(_in_our_names(outline, adapter, path, index.metadata))
    more, readers = kinds.tensor_names(), kinds.readers()
    ours = describe(shapes, more=more) or adapter
    _refuse_other_kinds(path, adapter, ours, purpose, allowed)
    for module, own in by_module(shapes).items():
        if (reader := readers.get(kind_of_layer(own, more=more))) is not None:
            _refuse_wrong_layer(f"{path}: {module}", own, reader, more)
    return adapter


def _in_our_names(
    tensors: Mapping[str, Tensor], contents: AdapterContents, path: Path, metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    """A file's tensors in kohya's names and LyCORIS' forms. `UserError` for what is not read, with the reason."""
    if contents.naming == "kohya":
        return from_kohya(tensors, source=str(path))
    return to_kohya(tensors, config=_config_of(path, metadata), source=f"{path} is {contents.title}")


def _refuse_other_kinds(
    path: Path, adapter: AdapterContents, ours: AdapterContents, purpose: str, allowed: Collection[str] | None
) -> None:
    """`UserError` for kinds of layers that are not `allowed`, with the way to have such a file trained or merged.
    `ours`: what the file holds once its tensors have our names."""
    readers = kinds.readers()
    wanted = set(readers) if allowed is None else {read for kind in allowed for read in kinds.load(kind).reads()}
    if not purpose or ours.holds_only(wanted):
        return
    unread = [kind for kind in ours.layers if kind not in readers]
    some = len(ours.layers) > 1 and not adapter.unknown
    if allowed is None:
        of_these = f"of which {' and '.join(map(short_title, unread))}" if some else "which"
        advice = f". LyCORIS trains it: {adapter.made_by}" if adapter.made_by and "train" in purpose else ""
        raise UserError(f"{path} is {adapter.title}, {of_these} no kind of adapter here reads{advice}")
    named = [kind for kind in allowed if kind != "norm"] or allowed  # norms may lie beside every kind
    nouns = " or ".join(dict.fromkeys(kinds.load(kind).NOUN for kind in named))
    said = f"{path} is {adapter.title}, and only {nouns} {purpose}"
    main = [kind for kind in ours.layers if kind != "norm"] or list(ours.layers)
    able = [kind for kind in kinds.KINDS if set(main) <= set(kinds.load(kind).reads())]
    if unread or ours.unknown:
        said += f". LyCORIS trains it: {adapter.made_by}" if adapter.made_by else ""
    elif "train" not in purpose:
        said += ". python -m networks.tools convert --to lora makes it one"
    elif able:
        said += f". {' or '.join(f'--network_module networks.{kind}' for kind in able)} trains it"
    else:
        said += ". No kind has layers of all of these: --base_weights merges it"
    raise UserError(said)


def _refuse_wrong_layer(
    where: str, own: Mapping[str, tuple[int, ...]], reader: type[Adapter], more: Mapping[str, tuple[str, ...]]
) -> None:
    """`UserError` for a layer of one of our kinds that has not all of its tensors, has tensors of another kind as well,
    or tensors whose shapes do not belong together. `more`: `kinds.tensor_names()`."""
    if (lacking := reader.lacking(own)) is not None:
        raise UserError(f"{where} has a {min(set(own) - {'alpha'})} and no {lacking}")
    for end, shape in own.items():
        other = kind_of_layer({end: shape}, more=more)
        if other and end not in reader.NAMES:
            raise UserError(f"{where} has tensors of two kinds: {end} is no part of {reader.NOUN}")
    for first, axis, second, other_axis in _SAME_RANK:
        if first not in own or second not in own or _TUCKER.get(first, "") in own:
            continue
        a, b = own[first], own[second]
        if len(a) <= axis or len(b) <= other_axis or a[axis] != b[other_axis]:
            raise UserError(f"{where}: {first} {list(a)} and {second} {list(b)} are not of one rank")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _config_of(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The scale settings of a file of diffusers or PEFT, from its metadata or the file beside it."""
    if (text := metadata.get(CONFIG_KEY)) is not None:
        return read_config(text, f"{path}: {CONFIG_KEY}")
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
