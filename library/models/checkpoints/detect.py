"""What a weights file or a diffusers folder is, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.errors import UserError
from library.files.tensors import WeightsIndex
from library.models.checkpoints.adapter_file import AdapterContents, describe
from library.models.checkpoints.checkpoint import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX

# What a file can be, as messages call it. "{path} is …" is how they begin.
TITLES = {
    "sd": "a Stable Diffusion 1.x or 2.x model",
    "sdxl": "an SDXL model",
    "embedding": "a textual inversion embedding",
    "hypernetwork": "a hypernetwork",
    "controlnet": "a ControlNet",
    "control_lora": "a Control-LoRA (a ControlNet of low rank)",
    "controlnet_lllite": "a ControlNet-LLLite",
    "t2i_adapter": "a T2I-Adapter",
    "ip_adapter": "an IP-Adapter",
    "motion_module": "a motion module of AnimateDiff",
    "upscaler": "an upscaler of images",
    "image_encoder": "an image encoder (CLIP vision)",
    "vae": "a VAE",
    "text_encoder": "a text encoder",
    "diffusers_unet": "the UNet of a diffusers folder",
    "unet": "a UNet without a text encoder",
    "sdxl_refiner": "the SDXL refiner",
    "sd3": "a Stable Diffusion 3 model",
    "flux": "a FLUX model",
    "edm": "an SDXL model of another kind (EDM, as Playground 2.5)",
}
# Models, but not of a kind that can be trained
_UNSUPPORTED = ("sdxl_refiner", "sd3", "flux", "edm")
_INSTEAD = {
    "vae": "give it as --vae beside a base model",
    "diffusers_unet": "give the folder that holds unet, vae and text_encoder",
    "unet": "give the complete checkpoint",
}
# How the names of their tensors begin. The first are asked before adapters, whose names some of them have as well.
_BEFORE_ADAPTERS = {
    "control_lora": ("lora_controlnet",),
    "controlnet_lllite": ("lllite_",),
    "controlnet": ("control_model.", "controlnet_", "input_hint_block."),
    "ip_adapter": ("image_proj.", "ip_adapter."),
}
_AFTER_MODELS = {
    "t2i_adapter": ("adapter.", "body.0.block", "body.0.in_conv"),
    "upscaler": ("conv_first.", "model.0.weight", "model.1.sub."),
    "image_encoder": ("vision_model.", "visual."),
}
_EDM_MARKS = {"edm_mean", "edm_std", "edm_vpred.sigma_max"}
_REFINER_POOLED = 2560  # width of the refiner's added conditions; SDXL base: 2816
_SEVERAL = 3  # names shown of a file of no known kind


@dataclass(frozen=True)
class FileKind:
    """kind: a key of TITLES, "adapter" or "" for none that is known. title: what messages call it, behind "is".
    adapter: what it holds, if it is an adapter."""

    kind: str
    title: str
    adapter: AdapterContents | None = None


def kind_of_file(index: WeightsIndex) -> FileKind:
    """UserError for a file without tensors."""
    if not index.entries:
        raise UserError(f"{index.path}: holds no tensors")
    kind = next((kind for kind, starts in _BEFORE_ADAPTERS.items() if _begins(index, *starts)), "")
    if not kind and any(".motion_modules." in name for name in index.entries):
        kind = "motion_module"
    if not kind and (adapter := describe({name: e.shape for name, e in index.entries.items()}, index.metadata)):
        return FileKind("adapter", adapter.title, adapter)
    kind = kind or _model(index) or _other(index)
    if kind:
        return FileKind(kind, TITLES[kind])
    some = ", ".join(sorted(index.entries)[:_SEVERAL])
    return FileKind(
        "", f"of no known kind ({len(index.entries)} tensors: {some}{', …' * (len(index.entries) > _SEVERAL)})"
    )


def not_a_base(found: FileKind) -> str:
    """Why a file or folder cannot be the base model, to be put behind its path and "is"."""
    if found.kind in _UNSUPPORTED:
        return f"{found.title}, which is not supported; this version trains Stable Diffusion 1.x, 2.x and XL"
    instead = _INSTEAD.get(found.kind, "")
    if found.adapter is not None and found.adapter.is_plain:
        instead = "to train on from it, give it as --network_weights"
    return f"{found.title}, not a base model" + (f"; {instead}" if instead else "")


def _begins(index: WeightsIndex, *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in index.entries)


def _model(index: WeightsIndex) -> str:
    """A model, or a part of one; "" where nothing is recognised."""
    names = index.entries
    label = next((entry for name, entry in names.items() if name.endswith("label_emb.0.0.weight")), None)
    if _begins(index, "conditioner.embedders.") or label:
        if label and label.shape[-1] == _REFINER_POOLED:
            return "sdxl_refiner"
        if not _begins(index, UNET_PREFIX) or not _begins(index, "conditioner.embedders."):
            return "unet"
        return "edm" if names.keys() & _EDM_MARKS else "sdxl"
    if _begins(index, "double_blocks.", f"{UNET_PREFIX}double_blocks.", "single_transformer_blocks."):
        return "flux"
    if _begins(index, "joint_blocks.", f"{UNET_PREFIX}joint_blocks."):
        return "sd3"
    if _begins(index, UNET_PREFIX):
        return "sd" if _begins(index, CLIP_PREFIX, OPEN_CLIP_PREFIX) else "unet"
    if _begins(index, "down_blocks.0.resnets.") and _begins(index, "time_embedding."):
        return "diffusers_unet"
    if is_vae(index):
        return "vae"
    encoder = ("text_model.", "embeddings.token_embedding.", "transformer.text_model.", "encoder.layers.0.self_attn")
    return "text_encoder" if _begins(index, *encoder) else ""


def _other(index: WeightsIndex) -> str:
    """What is neither a model nor an adapter."""
    names = index.entries
    if kind := next((kind for kind, starts in _AFTER_MODELS.items() if _begins(index, *starts)), ""):
        return kind
    if all(name.partition(".")[0].isdecimal() for name in names):  # A1111 calls the layers of one after their widths
        return "hypernetwork"
    if names.keys() & {"emb_params", "clip_l", "clip_g", "*", "string_to_param.*"}:  # kohya's, A1111's, OneTrainer's
        return "embedding"
    (first, *more) = names.items()  # diffusers' have one tensor, called after its word
    return "embedding" if not more and "." not in first[0] and len(first[1].shape) in (1, 2) else ""


def is_vae(index: WeightsIndex) -> bool:
    """Whether a file holds a VAE, bare or as part of a checkpoint, in either naming."""
    return any(name.removeprefix(VAE_PREFIX) == "encoder.conv_in.weight" for name in index.entries)


def is_v2(unet: Mapping[str, Any]) -> bool:
    """Whether a UNet's configuration is that of 2.x: by the width of the text states, at unknown widths by its form."""
    return {768: False, 1024: True}.get(unet["cross_attention_dim"], bool(unet.get("use_linear_projection")))


def kind_of_folder(pipeline: str, unet: Mapping[str, Any] | None) -> str | None:
    """The same for a diffusers folder, from the class in model_index.json and the UNet's configuration, if any."""
    if "XL" in pipeline or (unet or {}).get("addition_embed_type") == "text_time":
        pooled = (unet or {}).get("projection_class_embeddings_input_dim")
        return "sdxl_refiner" if pooled == _REFINER_POOLED else "sdxl" if unet is not None else None
    if "StableDiffusion3" in pipeline:
        return "sd3"
    if "Flux" in pipeline:
        return "flux"
    return "sd" if unet is not None else None
