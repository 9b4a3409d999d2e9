"""How much of a file fits a network, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from library.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NAMES_SHOWN = 5  # of those that do not fit; --console_log_level DEBUG shows all


@dataclass(frozen=True)
class LoadReport:
    """The result of loading a file. The names are those of adapted layers, `lora_unet_…`, each with all its tensors."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the network, not in the file: they start fresh
    unexpected: tuple[str, ...]  # in the file, not in the network: they are not used
    mismatched: tuple[str, ...]  # in both, with other tensors or shapes; each says how they differ
    only_ranks: bool = False  # whether all of these are low-rank pairs that differ in nothing but the rank


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


def check_loaded(report: LoadReport, source: str, *, sized_by_file: bool) -> None:
    """Say how much of `source` fits a network, whose ranks and forms may be the file's. `UserError` if nothing does, or
    where a layer has other shapes than the file."""
    if report.mismatched:
        advice = "It has other settings, which --dim_from_weights takes from it, or is for a model of other sizes."
        if sized_by_file:
            advice = "It is for a model of other sizes."
        elif report.only_ranks:
            advice = "Take the ranks from the file with --dim_from_weights, or give those that it has."
        raise UserError(
            f"{source}: {len(report.mismatched)} layers have other ranks or tensors in this file than in the network:"
            f"{some_names(report.mismatched)}\n{advice}"
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
