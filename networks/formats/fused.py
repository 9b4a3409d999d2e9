"""Layers of a model that files hold as one: query, key and value as qkv, one above the other.

A family declares which (`AdapterTargets.fused`); in the model each layer has an adapter of its own. The low-rank pairs
of the members become one pair of the sum of their ranks, with `down` stacked and `up` block by block on the diagonal;
its product is the members' products, one above the other. The way back cuts `up` into the members' rows and, where it
is made of such blocks, `down` as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from networks.load_report import by_module

if TYPE_CHECKING:
    from networks.sites import Site

_PAIR = {"lora_down.weight", "lora_up.weight"}
PLAIN = {*_PAIR, "alpha"}


def members(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """The layers that share a name in files, by that name, in the order in which they lie in it."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        if site.fused:
            found.setdefault(site.fused, []).append(site)
    return {name: sorted(group, key=lambda site: site.place) for name, group in found.items()}


def fuse(tensors: Mapping[str, Tensor], sites: Iterable[Site]) -> dict[str, Tensor]:
    """A network's tensors as files hold them: each group of low-rank pairs is one. A member without tensors adds
    nothing there; a group of another kind of adapter keeps its own names."""
    modules = by_module(tensors)
    for name, group in members(sites).items():
        own = [modules.get(site.name, {}) for site in group]
        if can_fuse(own):
            modules = {key: value for key, value in modules.items() if key not in {site.name for site in group}}
            modules[name] = fuse_pairs(own, [site.module.weight.shape[0] for site in group])
    return {f"{name}.{end}": tensor for name, own in modules.items() for end, tensor in own.items()}


def can_fuse(pairs: list[dict[str, Tensor]]) -> bool:
    """Whether these are low-rank pairs, some of which may be empty."""
    return any(pairs) and all(not one or _PAIR <= one.keys() <= PLAIN for one in pairs)


def fuse_pairs(pairs: list[dict[str, Tensor]], rows: list[int]) -> dict[str, Tensor]:
    """One pair of these, of which `up` has that many rows; an empty one adds nothing."""
    given = [pair for pair in pairs if pair]
    ranks = [pair["lora_down.weight"].shape[0] if pair else 0 for pair in pairs]
    scales = {_scale(pair) for pair in given}
    ups = [
        pair["lora_up.weight"] * (1.0 if len(scales) == 1 else _scale(pair))
        if pair
        else given[0]["lora_up.weight"].new_zeros(count, 0)
        for pair, count in zip(pairs, rows, strict=True)
    ]
    alpha = sum(ranks) * (scales.pop() if len(scales) == 1 else 1.0)
    return {
        "lora_down.weight": torch.cat([pair["lora_down.weight"] for pair in given]),
        "lora_up.weight": torch.block_diag(*ups),
        "alpha": torch.tensor(alpha),
    }


def _scale(pair: Mapping[str, Tensor]) -> float:
    rank = pair["lora_down.weight"].shape[0]
    is_known = "alpha" in pair and not pair["alpha"].is_meta  # not of an outline
    return float(pair["alpha"]) / rank if is_known else 1.0


def split(tensors: Mapping[str, Tensor], sites: Iterable[Site]) -> dict[str, Tensor]:
    """A file's tensors under the names of the model's layers."""
    modules = by_module(tensors)
    for name, group in members(sites).items():
        own = modules.get(name)
        rows = [site.module.weight.shape[0] for site in group]
        if own is not None and _PAIR <= own.keys() <= PLAIN and own["lora_up.weight"].shape[0] == sum(rows):
            del modules[name]
            modules |= {site.name: pair for site, pair in zip(group, split_pair(own, rows), strict=True)}
    return {f"{name}.{end}": tensor for name, own in modules.items() for end, tensor in own.items()}


def split_pair(pair: Mapping[str, Tensor], rows: list[int]) -> list[dict[str, Tensor]]:
    """One pair for each member, of which `up` has that many rows. Where each uses its own equal share of the ranks, no
    other ranks stay with it."""
    down, rank = pair["lora_down.weight"], pair["lora_down.weight"].shape[0]
    ups, scale, share = pair["lora_up.weight"].split(rows), _scale(pair), rank // len(rows)
    blocks = [slice(share * place, share * (place + 1)) for place in range(len(rows))]
    others = [torch.cat([up[:, : own.start], up[:, own.stop :]], dim=1) for up, own in zip(ups, blocks, strict=True)]
    is_known = not pair["lora_up.weight"].is_meta  # an outline is taken for what `fuse` makes
    if rank % len(rows) or (is_known and any(other.any() for other in others)):
        blocks = [slice(None)] * len(rows)
    return [
        {
            "lora_down.weight": down[own].clone(),
            "lora_up.weight": up[:, own].clone(),
            "alpha": torch.tensor(scale * len(down[own])),
        }
        for up, own in zip(ups, blocks, strict=True)
    ]
