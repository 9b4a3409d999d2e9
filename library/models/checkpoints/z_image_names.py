"""Z-Image's original names and diffusers' (ZImageTransformer2DModel): of weights in files, and of adapters' layers.

Original: Tongyi-MAI/Z-Image, as ComfyUI's files have it, with query, key and value as one layer. diffusers has the same
names but for attention and the ends, and adapters have diffusers'. Names alone: no weight is read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from library.files.tensors import TensorEntry

DOTTED = "diffusion_model."
"""How ComfyUI and diffusers begin the names of the transformer's layers in adapter files."""
_ENDS = {"x_embedder": "all_x_embedder.2-1", "final_layer": "all_final_layer.2-1"}  # of one patch size
_ATTENTION = {"out": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}
_MEMBERS = ("to_q", "to_k", "to_v")  # in the order in which they lie in qkv
_IN_ATTENTION = re.compile(r"(?P<block>.+\.attention)\.(?P<layer>\w+)")
_UNUSED = "norm_final.weight"  # of a layer that no version of the model runs
_BLOCK = re.compile(r"layers\.(\d+)\..+")
_FLAT = re.compile(r"lora_unet_(?P<root>layers|noise_refiner|context_refiner)_(?P<i>\d+)_(?P<rest>\w+)")
_RESTS = {
    **{f"attention_{name}": f"attention.{name}" for name in _MEMBERS},
    "attention_to_out_0": "attention.to_out.0",
    **{f"feed_forward_w{number}": f"feed_forward.w{number}" for number in (1, 2, 3)},
    "adaLN_modulation_0": "adaLN_modulation.0",
}


def transformer_entries(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The transformer of a file in the original layout or diffusers', without a prefix, under the names of diffusers'
    module. A name that no rule knows stays as it is, and the loader reports it."""
    found: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        path, _, leaf = name.rpartition(".")
        match = _IN_ATTENTION.fullmatch(path)
        if match and match["layer"] == "qkv":
            for place, member in enumerate(_MEMBERS):
                found[f"{match['block']}.{member}.{leaf}"] = entry.rows(place, len(_MEMBERS))
        elif match:
            found[f"{match['block']}.{_ATTENTION.get(match['layer'], match['layer'])}.{leaf}"] = entry
        elif name != _UNUSED:
            first, dot, rest = name.partition(".")
            found[f"{_ENDS.get(first, first)}{dot}{rest}"] = entry
    return found


def block_number(name: str) -> int | None:
    """The number of a layer's block; None outside of the blocks, as in the refiners before them."""
    match = _BLOCK.fullmatch(name)
    return None if match is None else int(match[1])


def dotted_name(name: str) -> str:
    """The name that ComfyUI and diffusers have in adapter files for a layer that musubi-tuner calls
    "lora_unet_layers_0_attention_to_q": "diffusion_model.layers.0.attention.to_q". "" for the name of no layer of
    Z-Image."""
    if match := _FLAT.fullmatch(name):
        rest = _RESTS.get(match["rest"])
        return "" if rest is None else f"{DOTTED}{match['root']}.{match['i']}.{rest}"
    return ""


def in_layers_of_their_own(name: str) -> list[str]:
    """The names of diffusers' layers that an original one is, by kohya's name of it: three of query, key and value, one
    of attention's output. Another name stays as it is."""
    match = _FLAT.fullmatch(name)
    if match and match["rest"] == "attention_qkv":
        return [f"{name.removesuffix('qkv')}{member}" for member in _MEMBERS]
    return [f"{name.removesuffix('out')}to_out_0"] if match and match["rest"] == "attention_out" else [name]
