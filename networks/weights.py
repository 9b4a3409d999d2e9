"""Reading adapter files, and saying what of a file fits a network."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from library.files.index import read_index
from library.models.checkpoints.adapter_file import AdapterFile, is_of_embedding
from library.models.checkpoints.detect import kind_of_file
from networks.naming import read_config, to_kohya

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WHOLE_NUMBERS = (".alpha", ".on_input", ".bias_indices", ".bias_size")  # ends of names that may hold them
_NAMES_SHOWN = 5  # of those that do not fit; --console_log_level DEBUG shows all


@dataclass(frozen=True)
class LoadReport:
    """What of a file went where. The names are those of adapted layers, `lora_unet_…`, each with all its tensors."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the network, not in the file: they start fresh
    unexpected: tuple[str, ...]  # in the file, not in the network: they are not used
    mismatched: tuple[str, ...]  # in both, with other tensors or shapes; each says how they differ
    only_ranks: bool = False  # whether all of these are low-rank pairs that differ in nothing but the rank


def read_weights(file: str | Path, *, purpose: str = "", keep_embeddings: bool = False) -> dict[str, Tensor]:
    """The tensors of an adapter file in kohya's names, on the CPU, whatever names the file has.

    Embeddings beside them are left out with a warning, unless they are to be kept. `UserError` if it is no such file,
    or, where a `purpose` is given, if it holds more than low-rank pairs; the purpose ends that sentence: "and only
    plain LoRA {purpose}".
    """
    path = Path(file)
    adapter, tensors = check_adapter_file(path, purpose=purpose), read_tensors(path)
    embeddings = {name: tensor for name, tensor in tensors.items() if is_of_embedding(name)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in embeddings}
    if embeddings and not keep_embeddings:
        words = ", ".join(adapter.embeddings)
        logger.warning("%s: textual inversion embeddings beside the LoRA are left out: %s", path, words)
        embeddings = {}
    if adapter.naming == "kohya":
        return tensors | embeddings
    config = _config_of(path)
    converted = to_kohya(tensors, config=config, source=str(path))
    alphas = "the alphas of its configuration" if config else "alpha = rank, since it has none"
    if any(name.endswith(".alpha") for name in tensors):
        alphas = "its own alphas"
    logger.info("%s: names in %s's style, read with %s", path, adapter.naming, alphas)
    return converted | embeddings


def check_adapter_file(file: str | Path, *, purpose: str = "") -> AdapterFile:
    """What an adapter file holds, by its header alone, before any model is loaded. Raises as `read_weights` does."""
    path = Path(file)
    index = read_index(path)
    found = kind_of_file(index)
    if found.adapter is None:
        raise UserError(f"{path} is {found.title}, and no LoRA")
    adapter = found.adapter
    if purpose and not adapter.is_plain:
        advice = f". LyCORIS trains it: {adapter.made_by}" if adapter.made_by and "train" in purpose else ""
        raise UserError(f"{path} is {adapter.title}, and only plain LoRA {purpose}{advice}")
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
    for module, own in by_module(index.entries).items() if adapter.naming == "kohya" else ():
        halves = {"lora_down.weight", "lora_up.weight"}
        if len(present := halves & own.keys()) == 1:
            raise UserError(f"{path}: {module} has a {min(present)} and no {min(halves - present)}")
    return adapter


def _config_of(path: Path) -> dict[str, Any] | None:
    """What a file of diffusers or PEFT says about its scale, in its metadata or in the file beside it."""
    if _is_safetensors(path):
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata")
        if text is not None:
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
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity: the run that wrote it had diverged")
    return tensors


def _is_safetensors(path: Path) -> bool:
    """By content: behind the length of the header comes its table."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def by_module(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """`{"lora_unet_x.alpha": t}` as `{"lora_unet_x": {"alpha": t}}`."""
    modules: dict[str, dict[str, T]] = {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        modules.setdefault(name, {})[rest] = tensor
    return modules


def compare(network: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> LoadReport:
    """Compare two state dicts, layer by layer: a layer matches if all its tensors do, in name and shape."""
    ours, theirs = by_module(network), by_module(file)
    matched, mismatched = [], []
    only_ranks = True
    for name in sorted(ours.keys() & theirs.keys()):
        difference = _difference(ours[name], theirs[name])
        if difference:
            mismatched.append(f"{name}{difference}")
            only_ranks &= _differ_in_rank(ours[name], theirs[name])
        else:
            matched.append(name)
    return LoadReport(
        matched=tuple(matched),
        missing=tuple(sorted(ours.keys() - theirs.keys())),
        unexpected=tuple(sorted(theirs.keys() - ours.keys())),
        mismatched=tuple(mismatched),
        only_ranks=bool(mismatched) and only_ranks,
    )


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in theirs:
            return f": the file has no {key}"
        if key not in ours:
            return f": the network has no {key}"
        if ours[key].shape != theirs[key].shape:
            return f".{key}: {list(theirs[key].shape)} in the file, {list(ours[key].shape)} here"
    return ""


_RANK_AXES = {"lora_down.weight": 0, "lora_up.weight": 1}


def _differ_in_rank(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether two layers are low-rank pairs of the same sizes."""

    def sizes(layer: Mapping[str, Tensor]) -> dict[str, list[int]]:
        found = {key: list(tensor.shape) for key, tensor in layer.items()}
        for key, axis in _RANK_AXES.items():
            if len(found.get(key, ())) > axis:
                found[key][axis] = 0
        return found

    return sizes(ours) == sizes(theirs) and _RANK_AXES.keys() <= ours.keys()


def check_loaded(report: LoadReport, source: str) -> None:
    """Say how much of `source` fits. `UserError` if nothing does, or where a layer has other shapes than the file."""
    if report.mismatched:
        raise UserError(
            f"{source}: {len(report.mismatched)} layers have other ranks or tensors in this file than in the network:"
            f"{some_names(report.mismatched)}\n"
            + (
                "Take the ranks from the file with --dim_from_weights, or give those that it has."
                if report.only_ranks
                else "It is for a model of other sizes, or was made with other settings of the network."
            )
        )
    if not report.matched:
        raise UserError(
            f"{source}: nothing in it fits this network: the file has{some_names(report.unexpected)}\n"
            f"and the network has{some_names(report.missing)}"
        )
    total = len(report.matched) + len(report.missing)
    logger.info("%s: %d of the network's %d modules loaded", source, len(report.matched), total)
    for names, fate in (
        (report.missing, "of the network are not in it and start fresh"),
        (report.unexpected, "of it are not in the network and are left out"),
    ):
        if names:
            logger.warning("%s: %d modules %s:%s", source, len(names), fate, some_names(names))
            logger.debug("%s: all of these:\n  %s", source, "\n  ".join(names))


def some_names(names: Sequence[str]) -> str:
    """The first few names, a line each."""
    more = len(names) - _NAMES_SHOWN
    lines = [*names[:_NAMES_SHOWN], *([f"… {more} more"] if more > 0 else [])]
    return "".join(f"\n  {line}" for line in lines or ["nothing"])
