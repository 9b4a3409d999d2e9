"""Stable Diffusion 3's original names and those of diffusers' SD3Transformer2DModel: of weights in files, and of
adapters' layers.

Original: Stability-AI/sd3.5, mmditx.py. There query, key and value are one layer. Its last norms of image and text have
(shift, scale) in their layer, where diffusers has (scale, shift): here they are as in the original. Names alone: no
weight is read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from library.files.tensors import TensorEntry
from library.models.checkpoints.flux_names import Member

POSITIONS = "pos_embed.pos_embed"
"""The table of places in diffusers' module: a buffer, which files have and nothing trains."""
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
# below "joint_blocks.0" and "transformer_blocks.0"
_PLAIN = {
    "x_block.attn.proj": "attn.to_out.0", "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn.ln_q": "attn.norm_q", "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q", "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn2.proj": "attn2.to_out.0", "x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.adaLN_modulation.1": "norm1.linear", "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
}  # fmt: skip
_FUSED = {
    "x_block.attn.qkv": tuple(Member(f"x_block.attn.to_{which}", f"attn.to_{which}") for which in "qkv"),
    "x_block.attn2.qkv": tuple(Member(f"x_block.attn2.to_{which}", f"attn2.to_{which}") for which in "qkv"),
    "context_block.attn.qkv": tuple(
        Member(f"context_block.attn.to_{which}", f"attn.add_{which}_proj") for which in "qkv"
    ),
}
_PATHS = _PLAIN | {member.name: member.path for members in _FUSED.values() for member in members}
_NAMES = {path: name for name, path in _PATHS.items()}
_OUTSIDE_NAMES = {path: name for name, path in _OUTSIDE.items()}
_SHARED = {member.name: fused for fused, members in _FUSED.items() for member in members}
_LAYERS = {name.replace(".", "_"): (Member(name, path),) for name, path in _PATHS.items()} | {
    name.replace(".", "_"): members for name, members in _FUSED.items()
}
_OUTSIDE_LAYERS = {name.replace(".", "_"): Member(name, path) for name, path in _OUTSIDE.items()}
_ORIGINAL = re.compile(r"joint_blocks\.(?P<i>\d+)\.(?P<rest>.+)")
_FLAT = re.compile(r"joint_blocks_(?P<i>\d+)_(?P<rest>\w+)")
_DIFFUSERS = re.compile(r"transformer_blocks\.(?P<i>\d+)\.(?P<rest>.+)")
# Of the models with such names in diffusers, FLUX.1 has the most double blocks, 19, and Anima has no "attn."
_BLOCKS_OF_OTHERS = 19
_JOINT = re.compile(r"transformer_blocks\.(\d+)\.(?:attn\.|ff_context\.|norm1_context\.).*")
_CONTEXT_NORM, _LAST_NORM = re.compile(r"transformer_blocks\.\d+\.norm1_context\.linear"), "norm_out.linear"


def transformer_entries(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The transformer of a file in the original layout, without a prefix, under the names of diffusers' module.

    A name that no rule knows stays as it is, and the loader reports it.
    """
    found: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        path, _, leaf = name.rpartition(".")
        match = _ORIGINAL.fullmatch(path)
        if name == "pos_embed":
            found[POSITIONS] = entry
        elif match is None:
            found[f"{_OUTSIDE.get(path, path)}.{leaf}" if path else name] = entry
        elif members := _FUSED.get(match["rest"]):
            for place, member in enumerate(members):
                whole = f"transformer_blocks.{match['i']}.{member.path}.{leaf}"
                found[whole] = entry.rows(place, len(members))
        else:
            rest = _PLAIN.get(match["rest"])
            found[name if rest is None else f"transformer_blocks.{match['i']}.{rest}.{leaf}"] = entry
    return found


def in_original_order(entries: Mapping[str, TensorEntry], *, layers: int) -> dict[str, TensorEntry]:
    """The weights of diffusers' module with the rows of its last norms as in the original."""
    last = (_LAST_NORM, f"transformer_blocks.{layers - 1}.norm1_context.linear")
    return {name: entry.exchanged() if name.rpartition(".")[0] in last else entry for name, entry in entries.items()}


def original_name(path: str) -> str:
    """The name that adapters have for a layer of diffusers' module: the original one, or that of a member of a fused
    layer, "joint_blocks.0.x_block.attn.to_q". Another path stays as it is."""
    match = _DIFFUSERS.fullmatch(path)
    if match is None:
        return _OUTSIDE_NAMES.get(path, path)
    rest = _NAMES.get(match["rest"])
    return path if rest is None else f"joint_blocks.{match['i']}.{rest}"


def fused_name(name: str) -> str:
    """The original layer that a member of this name belongs to, "joint_blocks.0.x_block.attn.qkv"; "" for none."""
    match = _ORIGINAL.fullmatch(name)
    shared = _SHARED.get(match["rest"]) if match else None
    return f"joint_blocks.{match['i']}.{shared}" if match and shared else ""


def fused_place(name: str) -> int:
    """Where a member's rows are in its layer, counted from 0."""
    return "qkv".index(name[-1])


def block_number(name: str) -> int | None:
    """The number of a layer's block; None outside of them."""
    match = _ORIGINAL.fullmatch(name)
    return None if match is None else int(match["i"])


def members_of(flat: str) -> tuple[Member, ...]:
    """The layers of diffusers' module that a key such as "joint_blocks_0_x_block_attn_qkv" is about, each with its
    whole path; empty for the name of no layer of Stable Diffusion 3."""
    if outside := _OUTSIDE_LAYERS.get(flat):
        return (outside,)
    match = _FLAT.fullmatch(flat)
    if match is None:
        return ()
    root = f"transformer_blocks.{match['i']}"
    return tuple(one._replace(path=f"{root}.{one.path}") for one in _LAYERS.get(match["rest"], ()))


def group_of(flat: str) -> tuple[str, dict[str, Member]] | None:
    """The fused layer that a key such as "joint_blocks_0_x_block_attn_to_q" is a member of, and all of its members, in
    their order, by their keys; None for another key."""
    match = _FLAT.fullmatch(flat)
    members = _LAYERS.get(match["rest"], ()) if match else ()
    if match is None or len(members) != 1 or (fused := _SHARED.get(members[0].name)) is None:
        return None
    root = f"joint_blocks_{match['i']}_"
    return root + fused.replace(".", "_"), {root + one.name.replace(".", "_"): one for one in _FUSED[fused]}


def is_sd3(shapes: Mapping[str, Iterable[tuple[int, ...]]]) -> bool:
    """Whether layers of an adapter, by their paths in diffusers' module, are of Stable Diffusion 3. FLUX.1's double
    blocks have most of these names. shapes: of each layer's tensors."""
    joint = [match for path in shapes if (match := _JOINT.fullmatch(path))]
    if not joint:
        return "pos_embed.proj" in shapes
    second = any(".attn2." in path for path in shapes)
    many = any(int(match[1]) >= _BLOCKS_OF_OTHERS for match in joint)
    return second or many or any(_is_last_norm(path, own) for path, own in shapes.items() if path != _LAST_NORM)


def has_halves(path: str, shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether the rows of this layer of diffusers' module have their halves exchanged in the original: scale and shift
    of the last norms. shapes: of an adapter's tensors there."""
    return path == _LAST_NORM or _is_last_norm(path, shapes)


def _is_last_norm(path: str, shapes: Iterable[tuple[int, ...]]) -> bool:
    """The text's last norm has two numbers for each channel, the others six; its layer takes as many channels."""
    pairs = [shape for shape in shapes if len(shape) == 2]
    rows, columns = max((s[0] for s in pairs), default=0), max((s[1] for s in pairs), default=0)
    return _CONTEXT_NORM.fullmatch(path) is not None and rows == 2 * columns
