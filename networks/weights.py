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
from library.models.tensors import read_index
from networks.naming import KOHYA_PREFIXES, Naming, naming_of, read_config, to_kohya

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NAMES_SHOWN = 5  # of those that do not fit; --console_log_level DEBUG shows all


@dataclass(frozen=True)
class LoadReport:
    """What of a file went where. The names are those of adapted layers, `lora_unet_…`, each with all its tensors."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the network, not in the file: they start fresh
    unexpected: tuple[str, ...]  # in the file, not in the network: they are not used
    mismatched: tuple[str, ...]  # in both, with other tensors or shapes; each says how they differ


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter file in kohya's names, on the CPU, whatever names the file has.

    `UserError` if it is no such file.
    """
    path, tensors = Path(file), read_tensors(file)
    naming = _naming(path, tensors)
    if naming == "kohya":
        return tensors
    config = _config_of(path)
    converted = to_kohya(tensors, config=config, source=str(path))
    scaled = "with the alphas of its configuration" if config else "with alpha = rank, since it names none"
    logger.info("%s: names in %s's style, read %s", path, naming, scaled)
    return converted


def check_adapter_file(file: str | Path) -> None:
    """`UserError` if it is no adapter file: all that its names and sizes tell, before any model is loaded."""
    path, entries = Path(file), read_index(Path(file)).entries
    naming = _naming(path, entries)
    for name, entry in entries.items():
        if not entry.count:
            raise UserError(f"{path}: {name} has the shape {list(entry.shape)}: it holds nothing")
        if "float" not in entry.dtype and not name.endswith("alpha"):
            raise UserError(f"{path}: {name} holds {entry.dtype}, which are no weights")
    for module, own in by_module(entries).items() if naming == "kohya" else ():
        halves = {"lora_down.weight", "lora_up.weight"}
        if len(found := halves & own.keys()) == 1:
            raise UserError(f"{path}: {module} has a {min(found)} and no {min(halves - found)}")


def _naming(path: Path, tensors: Mapping[str, object]) -> Naming:
    naming = naming_of(tensors)
    if naming is None and not tensors:
        raise UserError(f"{path}: holds no tensors")
    if naming is None:
        raise UserError(
            f"{path}: is no LoRA: no name begins with {', '.join(KOHYA_PREFIXES)}, and none is in the way of diffusers "
            f"or PEFT; the first is {min(tensors)!r}"
        )
    return naming


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
    for name in sorted(ours.keys() & theirs.keys()):
        difference = _difference(ours[name], theirs[name])
        if difference:
            mismatched.append(f"{name}{difference}")
        else:
            matched.append(name)
    return LoadReport(
        matched=tuple(matched),
        missing=tuple(sorted(ours.keys() - theirs.keys())),
        unexpected=tuple(sorted(theirs.keys() - ours.keys())),
        mismatched=tuple(mismatched),
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


def check_loaded(report: LoadReport, source: str) -> None:
    """Say how much of `source` fits. `UserError` if nothing does, or where a layer has other shapes than the file."""
    if report.mismatched:
        raise UserError(
            f"{source}: {len(report.mismatched)} layers are made otherwise than here:{some_names(report.mismatched)}\n"
            "Take the ranks from the file with --dim_from_weights, or give those that it has."
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
