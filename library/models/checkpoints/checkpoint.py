"""Single-file checkpoints (the CompVis/LDM layout) to diffusers' and transformers' weight names.

Everything here is names and positions: each function takes a file's table of tensors and returns one under the names
of the module that is to be filled, so that loading can go tensor by tensor. A name that no rule knows stays as it is,
and the loader reports it as one that the module does not have.

The layouts: CompVis/stable-diffusion ldm/modules/diffusionmodules/{openaimodel,model}.py, open_clip's transformer.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from library.files.tensors import TensorEntry

Entries = Mapping[str, TensorEntry]

UNET_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."  # SD 1.x: the layout of transformers
OPEN_CLIP_PREFIX = "cond_stage_model.model."  # SD 2.x: the layout of open_clip
# SDXL has one of each
TEXT_PREFIXES: dict[str, dict[str, tuple[str, ...]]] = {
    "sd": {"text_encoder": (CLIP_PREFIX, OPEN_CLIP_PREFIX)},
    "sdxl": {"text_encoder": ("conditioner.embedders.0.transformer.",),
             "text_encoder_2": ("conditioner.embedders.1.model.",)},
}  # fmt: skip
_CLIP_PREFIXES = (CLIP_PREFIX, *TEXT_PREFIXES["sdxl"]["text_encoder"])
_OPEN_CLIP_PREFIXES = (OPEN_CLIP_PREFIX, *TEXT_PREFIXES["sdxl"]["text_encoder_2"])

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
_UNET_STARTS = {path: name for name, path in _UNET_ENDS.items()}
_ORIGINAL_RESNET = {path: name for name, path in _RESNET.items()}
_UNET_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OPEN_CLIP = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
_CLIP_UNUSED = {"text_projection", "text_projection.weight", "logit_scale", "attn_mask", "embeddings.position_ids"}


def strip(entries: Entries, prefix: str) -> dict[str, TensorEntry]:
    """The entries under a prefix, without it."""
    return {name[len(prefix) :]: entry for name, entry in entries.items() if name.startswith(prefix)}


def unet_entries(entries: Entries, *, layers_per_block: int) -> dict[str, TensorEntry]:
    """The UNet of a single file under the names of diffusers' UNet2DConditionModel."""
    inner = strip(entries, UNET_PREFIX)
    return {unet_name(name, layers_per_block=layers_per_block): entry for name, entry in inner.items()}


def unet_name(name: str, *, layers_per_block: int) -> str:
    """For example input_blocks.1.1.proj_in.weight → down_blocks.0.attentions.0.proj_in.weight."""
    path, _, leaf = name.rpartition(".")
    if path in _UNET_ENDS:
        return f"{_UNET_ENDS[path]}.{leaf}"
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", path):
        return f"{_UNET_MIDDLE[found[1]]}.{_RESNET.get(found[2], found[2])}.{leaf}"
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.([012])\.(.+)", path)
    if not found:
        return name
    side, part, rest = found[1], found[3], found[4]
    # one more than layers_per_block on both sides: the sampler's place on the way down, a further layer on the way up
    block, layer = divmod(int(found[2]) - (side == "input"), layers_per_block + 1)
    root = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if rest == "op":
        return f"{root}.downsamplers.0.conv.{leaf}"
    if rest == "conv":  # after the attention, or in its place where the block has none
        return f"{root}.upsamplers.0.conv.{leaf}"
    if part == "0":
        return f"{root}.resnets.{layer}.{_RESNET.get(rest, rest)}.{leaf}"
    return f"{root}.attentions.{layer}.{rest}.{leaf}"


def original_unet_name(path: str, *, layers_per_block: int) -> str:
    """The way back for a module's path, as LoRA files of SDXL name it.

    For example down_blocks.1.attentions.0.proj_in → input_blocks.4.1.proj_in.
    """
    if path in _UNET_STARTS:
        return _UNET_STARTS[path]
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{_ORIGINAL_RESNET.get(found[3], found[3])}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", path)
    assert found, f"no layer of a UNet: {path}"
    first = int(found[2]) * (layers_per_block + 1)
    if found[3] == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.op"
    if found[3] == "upsamplers":
        return f"output_blocks.{first + layers_per_block}.2.conv"  # behind resnet and attention
    number = first + int(found[4]) + (found[1] == "down")
    side, rest = {"down": "input", "up": "output"}[found[1]], _ORIGINAL_RESNET.get(found[5], found[5])
    return f"{side}_blocks.{number}.{int(found[3] == 'attentions')}.{rest}"


def vae_entries(entries: Entries) -> dict[str, TensorEntry]:
    """A VAE under the names of diffusers' AutoencoderKL, from a checkpoint or a VAE's own file in any naming."""
    inner = strip(entries, VAE_PREFIX) or dict(entries)
    up_blocks = 1 + max((int(n.split(".")[2]) for n in inner if n.startswith("decoder.up.")), default=-1)
    # the discriminator of the VAE's own training and the running average are no part of the model
    return {vae_name(n, up_blocks=up_blocks): e for n, e in inner.items() if not n.startswith(("loss.", "model_ema."))}


def vae_name(name: str, *, up_blocks: int) -> str:
    """For example, of 4 up blocks, decoder.up.3.block.0.conv1.weight → decoder.up_blocks.0.resnets.0.conv1.weight."""
    name = name.replace(".norm_out.", ".conv_norm_out.").replace(".nin_shortcut.", ".conv_shortcut.")
    if found := re.fullmatch(r"(.+\.mid)\.block_([12])\.(.+)", name):
        return f"{found[1]}_block.resnets.{int(found[2]) - 1}.{found[3]}"
    if found := re.fullmatch(r"(.+\.mid)\.attn_1\.(norm|q|k|v|proj_out)\.(.+)", name):
        return f"{found[1]}_block.attentions.0.{_VAE_ATTENTION[found[2]]}.{found[3]}"
    if found := re.fullmatch(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(.+)", name):
        return f"{found[1]}.{_OLD_VAE_ATTENTION[found[2]]}.{found[3]}"
    found = re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.(block\.|downsample\.|upsample\.)(.+)", name)
    if not found:
        return name
    # the old layout counts the decoder's blocks by resolution, diffusers in the order in which they run
    block = int(found[3]) if found[2] == "down" else up_blocks - 1 - int(found[3])
    kind = {"block.": "resnets.", "downsample.": "downsamplers.0.", "upsample.": "upsamplers.0."}[found[4]]
    return f"{found[1]}.{found[2]}_blocks.{block}.{kind}{found[5]}"


def text_encoder_entries(entries: Entries, *, layers: int) -> dict[str, TensorEntry]:
    """A text encoder under the names of transformers' CLIPTextModel, from a single file or a text encoder's own file.

    Layers from `layers` on are left out: SD 2.x never uses the last one of its open_clip model.
    """
    if inner := _stripped(entries, _OPEN_CLIP_PREFIXES):
        found = _open_clip_entries(inner)
    else:
        inner = _stripped(entries, _CLIP_PREFIXES) or dict(entries)
        found = {name.removeprefix("text_model."): entry for name, entry in inner.items()}
    late = re.compile(r"encoder\.layers\.(\d+)\.")
    unused = {n for n in found if (m := late.match(n)) and int(m[1]) >= layers} | _CLIP_UNUSED
    return {name: entry for name, entry in found.items() if name not in unused}


def text_entries_of(part: str) -> Callable[..., dict[str, TensorEntry]]:
    """The reader of "text_encoder" or "text_encoder_2"."""
    return projected_text_encoder_entries if part == "text_encoder_2" else text_encoder_entries


def projected_text_encoder_entries(entries: Entries, *, layers: int) -> dict[str, TensorEntry]:
    """The same with the projection of its pooled output, under the names of CLIPTextModelWithProjection."""
    found = {f"text_model.{name}": e for name, e in text_encoder_entries(entries, layers=layers).items()}
    inner = _stripped(entries, _OPEN_CLIP_PREFIXES) or dict(entries)
    if "text_projection" in inner:  # open_clip multiplies by it from the right, a Linear by its transpose
        found["text_projection.weight"] = inner["text_projection"].transposed()
    elif "text_projection.weight" in inner:
        found["text_projection.weight"] = inner["text_projection.weight"]
    return found


def _stripped(entries: Entries, prefixes: Sequence[str]) -> dict[str, TensorEntry]:
    """The entries under the first of these prefixes that there is."""
    return next((inner for prefix in prefixes if (inner := strip(entries, prefix))), {})


def _open_clip_entries(inner: Entries) -> dict[str, TensorEntry]:
    found: dict[str, TensorEntry] = {}
    for name, entry in inner.items():
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
        if not layer:
            found[_OPEN_CLIP.get(name, name.removeprefix("transformer.text_model."))] = entry
        elif layer[2] == "attn.in_proj":  # query, key and value one above the other
            for part, which in enumerate("qkv"):
                found[f"encoder.layers.{layer[1]}.self_attn.{which}_proj.{layer[3]}"] = entry.rows(part, 3)
        else:
            found[f"encoder.layers.{layer[1]}.{_OPEN_CLIP_LAYER.get(layer[2], layer[2])}.{layer[3]}"] = entry
    return found
