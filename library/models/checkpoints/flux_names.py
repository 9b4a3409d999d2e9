"""FLUX.1's original names and those of diffusers' FluxTransformer2DModel: of weights in files, and of adapters' layers.
Chroma has the same, less the modulation, which a layer of its own computes for all blocks.

Original: black-forest-labs/flux, src/flux/model.py and modules/layers.py. There query, key and value are one layer, in
the single blocks with the first layer of the MLP beside them. Names alone: no weight is read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from library.files.tensors import TensorEntry

_OUTSIDE = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
# of blocks, below "double_blocks.0" and "transformer_blocks.0", "single_blocks.0" and "single_transformer_blocks.0"
_DOUBLE = {
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}  # fmt: skip
_SINGLE = {
    "linear2": "proj_out", "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k",
}  # fmt: skip


class Member(NamedTuple):
    """A layer that the original holds together with others. name: below the block, for adapters. path: diffusers',
    below the block. rows: its share of the rows, as multiples of the width."""

    name: str
    path: str
    rows: int = 1


_FUSED = {
    "double": {
        "img_attn.qkv": tuple(Member(f"img_attn.to_{which}", f"attn.to_{which}") for which in "qkv"),
        "txt_attn.qkv": tuple(Member(f"txt_attn.to_{which}", f"attn.add_{which}_proj") for which in "qkv"),
    },
    "single": {
        "linear1": (
            *(Member(f"to_{which}", f"attn.to_{which}") for which in "qkv"),
            Member("proj_mlp", "proj_mlp", 4),
        )
    },
}
_ROOTS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
_PLAIN = {"double": _DOUBLE, "single": _SINGLE}
_ORIGINAL = re.compile(r"(?P<kind>double|single)_blocks\.(?P<i>\d+)\.(?P<rest>.+)")
_APPROXIMATOR = re.compile(r"(?P<layer>distilled_guidance_layer\.layers\.\d+)\.(?P<end>in|out)_layer")
_LINEARS = {"in": "linear_1", "out": "linear_2"}
_FLAT = re.compile(r"(?P<kind>double|single)_blocks_(?P<i>\d+)_(?P<rest>\w+)")
_DIFFUSERS = re.compile(r"(?P<single>single_)?transformer_blocks\.(?P<i>\d+)\.(?P<rest>.+)")


def transformer_entries(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The transformer of a file in the original layout, without a prefix, under the names of diffusers' module.

    A name that no rule knows stays as it is, and the loader reports it.
    """
    found: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        path, _, leaf = name.rpartition(".")
        leaf = "weight" if leaf == "scale" else leaf  # of RMS norms
        match = _ORIGINAL.fullmatch(path)
        members = _FUSED[match["kind"]].get(match["rest"], ()) if match else ()
        first, parts = 0, sum(member.rows for member in members)
        for member in members:
            assert match is not None
            place = f"{_ROOTS[match['kind']]}.{match['i']}.{member.path}.{leaf}"
            found[place] = entry.rows(first, parts, count=member.rows)
            first += member.rows
        if not members:
            # the original has (shift, scale) where diffusers has (scale, shift)
            entry = entry.exchanged() if path == "final_layer.adaLN_modulation.1" else entry
            found[f"{_path(path)}.{leaf}"] = entry
    return found


def _path(path: str) -> str:
    """diffusers' path of a layer that the original holds by itself."""
    if match := _ORIGINAL.fullmatch(path):
        rest = _PLAIN[match["kind"]].get(match["rest"])
        return path if rest is None else f"{_ROOTS[match['kind']]}.{match['i']}.{rest}"
    if match := _APPROXIMATOR.fullmatch(path):
        return f"{match['layer']}.{_LINEARS[match['end']]}"
    return _OUTSIDE.get(path, path)


_BACK = {
    kind: {
        **{path: name for name, path in table.items()},
        **{member.path: member.name for members in _FUSED[kind].values() for member in members},
    }
    for kind, table in _PLAIN.items()
}
_OUTSIDE_BACK = {path: name for name, path in _OUTSIDE.items()}
_SHARED = {
    kind: {member.name: fused for fused, members in table.items() for member in members}
    for kind, table in _FUSED.items()
}


def original_name(path: str) -> str:
    """The name that adapters have for a layer of diffusers' module: the original one, or that of a member of a fused
    layer, "double_blocks.0.img_attn.to_q". Another path stays as it is."""
    match = _DIFFUSERS.fullmatch(path)
    if match is None:
        return _OUTSIDE_BACK.get(path, path)
    kind = "single" if match["single"] else "double"
    rest = _BACK[kind].get(match["rest"])
    return path if rest is None else f"{kind}_blocks.{match['i']}.{rest}"


def fused_name(name: str) -> str:
    """The original layer that a member of this name belongs to, "double_blocks.0.img_attn.qkv"; "" for none."""
    match = _ORIGINAL.fullmatch(name)
    shared = _SHARED[match["kind"]].get(match["rest"]) if match else None
    return f"{match['kind']}_blocks.{match['i']}.{shared}" if match and shared else ""


def fused_place(name: str) -> int:
    """Where a member's rows are in its layer, counted from 0."""
    match = _ORIGINAL.fullmatch(name)
    assert match is not None, f"no member: {name}"
    members = _FUSED[match["kind"]][_SHARED[match["kind"]][match["rest"]]]
    return [member.name for member in members].index(match["rest"])


def block_number(name: str, *, doubles: int) -> int | None:
    """The number of a layer's block, from its name: the single ones follow the double ones. None outside of them."""
    match = _ORIGINAL.fullmatch(name)
    return None if match is None else int(match["i"]) + (doubles if match["kind"] == "single" else 0)


def _flat_rests(kind: str) -> dict[str, tuple[Member, ...]]:
    plain = {name: (Member(name, path),) for name, path in _PLAIN[kind].items()}
    members = {member.name: (member,) for group in _FUSED[kind].values() for member in group}
    return {name.replace(".", "_"): group for name, group in {**plain, **members, **_FUSED[kind]}.items()}


_RESTS = {kind: _flat_rests(kind) for kind in _ROOTS}


def members_of(flat: str) -> tuple[Member, ...]:
    """The layers of diffusers' module that a key such as "double_blocks_0_img_attn_qkv" is about, each with its whole
    path; empty for the name of no layer in a block of FLUX.1."""
    match = _FLAT.fullmatch(flat)
    if match is None:
        return ()
    root = f"{_ROOTS[match['kind']]}.{match['i']}"
    return tuple(one._replace(path=f"{root}.{one.path}") for one in _RESTS[match["kind"]].get(match["rest"], ()))


_GROUPS = {
    kind: {
        member.name.replace(".", "_"): (fused.replace(".", "_"), members)
        for fused, members in table.items()
        for member in members
    }
    for kind, table in _FUSED.items()
}


def group_of(flat: str) -> tuple[str, dict[str, Member]] | None:
    """The fused layer that a key such as "double_blocks_0_img_attn_to_q" is a member of, and all of its members, in
    their order, by their keys; None for another key."""
    match = _FLAT.fullmatch(flat)
    group = _GROUPS[match["kind"]].get(match["rest"]) if match else None
    if match is None or group is None:
        return None
    block, (fused, members) = f"{match['kind']}_blocks_{match['i']}", group
    return f"{block}_{fused}", {f"{block}_{member.name.replace('.', '_')}": member for member in members}
