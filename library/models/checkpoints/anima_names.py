"""Anima's original names and diffusers' (CosmosTransformer3DModel): of weights in files, and of adapters' layers.

Original: NVIDIA's Cosmos-Predict2 (cosmos_predict2/models/text2image_dit.py), with Anima's LLM adapter beside it. Both
have the same layers, so each name has one counterpart. Names alone: no weight is read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from library.files.tensors import TensorEntry

LLM_ADAPTER = "llm_adapter."
_OUTSIDE = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.linear": "proj_out",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
}
_ATTENTION = {
    "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0", "q_norm": "norm_q",
    "k_norm": "norm_k",
}  # fmt: skip
# below "blocks.0" and "transformer_blocks.0"
_IN_BLOCK = {
    **{f"self_attn.{name}": f"attn1.{path}" for name, path in _ATTENTION.items()},
    **{f"cross_attn.{name}": f"attn2.{path}" for name, path in _ATTENTION.items()},
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{part}.{number}": f"norm{place}.linear_{number}"
        for place, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for number in (1, 2)
    },
}
_IN_BLOCK_BACK = {path: name for name, path in _IN_BLOCK.items()}
_OUTSIDE_BACK = {path: name for name, path in _OUTSIDE.items()}
_FLAT = {name.replace(".", "_"): name for name in _IN_BLOCK}
_ORIGINAL = re.compile(r"blocks\.(\d+)\.(.+)")
_DIFFUSERS = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_KOHYA = re.compile(r"lora_unet_blocks_(\d+)_(\w+)")
_KOHYA_TEXT = re.compile(r"lora_te_layers_(\d+)_(self_attn|mlp)_([a-z]+_proj)")
# Tables that follow from the configuration, counters of the training, and the state of NVIDIA's layers
_UNUSED = re.compile(r"pos_embedder\..*|accum_.*|.*_extra_state|llm_adapter\.rotary_emb\..*")

DOTTED = "diffusion_model."
"""How ComfyUI and diffusers begin the names of the transformer's layers in adapter files."""
DOTTED_TEXT = "text_encoders.qwen3_06b.transformer.model."
"""The same of the text encoder's, ComfyUI's alone."""


def transformer_entries(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The transformer of a file in the original layout, without a prefix, under the names of diffusers' module.

    A name that no rule knows stays as it is, and the loader reports it.
    """
    found = {}
    for name, entry in entries.items():
        if not name.startswith(LLM_ADAPTER) and not _UNUSED.fullmatch(name):
            path, _, leaf = name.rpartition(".")
            found[f"{_path(path)}.{leaf}"] = entry
    return found


def adapter_entries(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The LLM adapter of such a file, under the names of diffusers' AnimaTextConditioner, which are the original ones.
    Empty if there is none."""
    return {
        name.removeprefix(LLM_ADAPTER): entry
        for name, entry in entries.items()
        if name.startswith(LLM_ADAPTER) and not _UNUSED.fullmatch(name)
    }


def _path(path: str) -> str:
    """diffusers' path of a layer of the original transformer."""
    if match := _ORIGINAL.fullmatch(path):
        rest = _IN_BLOCK.get(match[2])
        return path if rest is None else f"transformer_blocks.{match[1]}.{rest}"
    return _OUTSIDE.get(path, path)


def original_name(path: str) -> str:
    """The original name of a layer of diffusers' module. Another path stays as it is."""
    match = _DIFFUSERS.fullmatch(path)
    if match is None:
        return _OUTSIDE_BACK.get(path, path)
    rest = _IN_BLOCK_BACK.get(match[2])
    return path if rest is None else f"blocks.{match[1]}.{rest}"


def block_number(name: str) -> int | None:
    """The number of a layer's block, from its original name; None outside of the blocks."""
    match = _ORIGINAL.fullmatch(name)
    return None if match is None else int(match[1])


def dotted_name(name: str) -> str:
    """The name that ComfyUI has in adapter files for a layer that kohya calls "lora_unet_blocks_0_self_attn_q_proj":
    "diffusion_model.blocks.0.self_attn.q_proj". "" for the name of no layer of Anima."""
    if match := _KOHYA.fullmatch(name):
        rest = _FLAT.get(match[2])
        return "" if rest is None else f"{DOTTED}blocks.{match[1]}.{rest}"
    if match := _KOHYA_TEXT.fullmatch(name):
        return f"{DOTTED_TEXT}layers.{match[1]}.{match[2]}.{match[3]}"
    return ""
