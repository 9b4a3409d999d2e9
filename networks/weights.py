"""Reading adapter files, and saying what of a file fits a network."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError, nearest_path

logger = logging.getLogger(__name__)

KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")


@dataclass(frozen=True)
class LoadReport:
    """What of a file went where. The names are those of adapted layers, `lora_unet_…`, each with all its tensors."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the network, not in the file: they start fresh
    unexpected: tuple[str, ...]  # in the file, not in the network: they are not used
    mismatched: tuple[str, ...]  # in both, with other tensors or shapes: they start fresh; each says how they differ


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter file in kohya's names, on the CPU. `UserError` if it is no such file."""
    tensors = read_tensors(file)
    _check_names(Path(file), tensors)
    return tensors


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter file, whatever their names, on the CPU. Pickled files may hold tensors only."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: no such file{nearest_path(path)}")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: cannot be read as an adapter file: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path}: is not a flat table of tensors, as adapter files are")
    return tensors


def _check_names(path: Path, tensors: Mapping[str, object]) -> None:
    if any(key.startswith(KOHYA_PREFIXES) for key in tensors):
        return
    some = next(iter(tensors), "")
    if any(mark in key for key in tensors for mark in (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", "_lora.")):
        raise UserError(
            f"{path}: names in the diffusers or PEFT style ({some}) are not supported yet; "
            "convert it to kohya's names (lora_unet_…, lora_te_…) first"
        )
    raise UserError(f"{path}: no name begins with {', '.join(KOHYA_PREFIXES)}; the first is {some!r}")


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`{"lora_unet_x.alpha": t}` as `{"lora_unet_x": {"alpha": t}}`."""
    modules: dict[str, dict[str, Tensor]] = {}
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
    """Raise a `UserError` if nothing of `source` fits, warn with counts if something does not."""
    if not report.matched:
        raise UserError(
            f"{source}: nothing in it fits this network ({_counts(report)}).{_example(report.mismatched)}"
            + (" Take the ranks from the file with --dim_from_weights." if report.mismatched else "")
        )
    if report.missing or report.unexpected or report.mismatched:
        examples = (*report.mismatched[:1], *report.unexpected[:1], *report.missing[:1])
        logger.warning("%s fits in part: %s.%s", source, _counts(report), _example(examples))
    else:
        logger.info("%s: all %d modules loaded", source, len(report.matched))


def _counts(report: LoadReport) -> str:
    return (
        f"{len(report.matched)} loaded, {len(report.missing)} of the network not in the file, "
        f"{len(report.unexpected)} of the file not in the network, {len(report.mismatched)} that differ"
    )


def _example(names: Iterable[str]) -> str:
    name = next(iter(names), None)
    return f" For example {name}." if name else ""
