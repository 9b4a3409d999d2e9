"""FLUX.2's original names and those of diffusers' Flux2Transformer2DModel: of weights in files, of adapters' layers.

Original: black-forest-labs/flux2, src/flux2/model.py. They are FLUX.1's but for the single blocks, whose two layers are
one each in diffusers as well, and for modulation, which all blocks share. Names alone: no weight is read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from library.files.tensors import TensorEntry
from library.models.checkpoints import flux_names
from library.models.checkpoints.flux_names import Member

# of blocks, below "single_blocks.0" and "single_transformer_blocks.0"
_SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k",
}  # fmt: skip
_SINGLE_BACK = {path: name for name, path in _SINGLE.items()}
# what diffusers calls otherwise than the same layer of FLUX.1: the end or the beginning of a path
_ENDS = {".net.0.proj": ".linear_in", ".net.2": ".linear_out"}
_BEGINNINGS = {"time_text_embed.": "time_guidance_embed."}
_MODULATION = re.compile(r"(?P<layer>(?:double_stream_modulation_(?:img|txt)|single_stream_modulation)\.)lin$")
_ORIGINAL_SINGLE = re.compile(r"single_blocks\.(?P<i>\d+)\.(?P<rest>.+)")
_DIFFUSERS_SINGLE = re.compile(r"single_transformer_blocks\.(?P<i>\d+)\.(?P<rest>.+)")
_FLAT = re.compile(r"single_blocks_(?P<i>\d+)_(?P<rest>\w+)|double_blocks_\d+_(?:img|txt)_(?P<mlp>mlp_[02])")
# How many times as large the one side of a layer is as the other; FLUX.1's have 7, 5, 4 and 4
_RATIOS = {"linear1": 9, "linear2": 4, "mlp_0": 6, "mlp_2": 3}


def transformer_entries(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The transformer of a file in the original layout or diffusers', without a prefix, under the names of diffusers'
    module. A name that no rule knows stays as it is, and the loader reports it."""
    found: dict[str, TensorEntry] = {}
    others: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        path, _, leaf = name.rpartition(".")
        match = _ORIGINAL_SINGLE.fullmatch(path)
        if match and (rest := _SINGLE.get(match["rest"])):
            leaf = "weight" if leaf == "scale" else leaf  # of RMS norms
            found[f"single_transformer_blocks.{match['i']}.{rest}.{leaf}"] = entry
        else:
            others[name] = entry
    for name, entry in flux_names.transformer_entries(others).items():
        path, _, leaf = name.rpartition(".")
        found[f"{_from_flux_1(path)}.{leaf}"] = entry
    return found


def _from_flux_1(path: str) -> str:
    """diffusers' path of a layer, from that of the same one of FLUX.1."""
    return _exchanged(_MODULATION.sub(r"\g<layer>linear", path), _ENDS, _BEGINNINGS)


def _to_flux_1(path: str) -> str:
    ends, beginnings = ({new: old for old, new in table.items()} for table in (_ENDS, _BEGINNINGS))
    return _exchanged(path, ends, beginnings)


def _exchanged(path: str, ends: Mapping[str, str], beginnings: Mapping[str, str]) -> str:
    for old, new in ends.items():
        path = path.removesuffix(old) + new if path.endswith(old) else path
    for old, new in beginnings.items():
        path = new + path.removeprefix(old) if path.startswith(old) else path
    return path


def original_name(path: str) -> str:
    """The name that adapters have for a layer of diffusers' module: the original one, or that of a member of a fused
    layer, "double_blocks.0.img_attn.to_q". Another path stays as it is."""
    if match := _DIFFUSERS_SINGLE.fullmatch(path):
        rest = _SINGLE_BACK.get(match["rest"])
        return path if rest is None else f"single_blocks.{match['i']}.{rest}"
    there = _to_flux_1(path)
    name = flux_names.original_name(there)
    return path if name == there else name


def members_of(flat: str) -> tuple[Member, ...]:
    """The layers of diffusers' module that a key such as "double_blocks_0_img_attn_qkv" is about, each with its whole
    path; empty for the name of no layer in a block of FLUX.2."""
    match = _FLAT.fullmatch(flat)
    if match and match["rest"]:
        path = _SINGLE.get(match["rest"])
        return () if path is None else (Member(match["rest"], f"single_transformer_blocks.{match['i']}.{path}"),)
    return tuple(one._replace(path=_from_flux_1(one.path)) for one in flux_names.members_of(flat))


def is_of_flux2(flat: str, rows: int, columns: int) -> bool:
    """Whether a layer with this key, which FLUX.1 has as well, has FLUX.2's sizes. False of those whose sizes are the
    same in both: these have the same names in diffusers, too."""
    match = _FLAT.fullmatch(flat)
    if match is None:
        return False
    return max(rows, columns) == _RATIOS.get(match["rest"] or match["mlp"], 0) * min(rows, columns)
