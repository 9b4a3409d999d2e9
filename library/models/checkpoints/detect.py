"""Recognises a weights file or a diffusers folder from names and shapes alone.

Every family of `library.models.FAMILIES` is asked whether it claims the file. A file that none claims is described: as
an adapter, a part of a model, or a model of a kind that cannot be trained here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.config.registry import load_path
from library.errors import UserError
from library.files.json_text import Config
from library.files.tensors import TensorEntry, WeightsIndex
from library.models import FAMILIES
from library.models.checkpoints.adapter_file import AdapterContents, describe
from library.models.checkpoints.base_model import Folder
from library.models.checkpoints.checkpoint import UNET_PREFIX, VAE_PREFIX
from library.models.checkpoints.parts import wan_vae

if TYPE_CHECKING:
    from library.models.family import ModelFamily

# Kinds of files that are no model of a family. Messages begin with "{path} is …".
TITLES = {
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
    "sd3_other": "a Stable Diffusion 3 model of another kind",
    "flux_other": "a FLUX model of another kind",
    "flux_kontext": "a FLUX.1 Kontext model, which edits images",
    "flux_fill": "a FLUX.1 Fill model, which paints parts of images",
    "flux_control": "a FLUX.1 Depth or Canny model",
    "transformer": "the transformer of a diffusers folder",
    "flux2_dev": "a FLUX.2 dev model of 32 billion parameters, with a text encoder of 24 billion (Mistral 3)",
    "flux2_other": "a FLUX.2 model of another kind",
    "chroma_radiance": "a Chroma1-Radiance model, which has no autoencoder",
    "chroma_other": "a Chroma model of another kind",
    "lumina": "a Lumina-Image model",
    "z_image_edit": "a Z-Image model of another kind, which is given images as well",
    "cosmos": "a Cosmos-Predict2 model that is not for images alone",
    "edm": "an SDXL model of another kind (EDM, as Playground 2.5)",
}
# Models, but not of a kind that can be trained
_UNSUPPORTED = (
    *("sdxl_refiner", "sd3_other", "edm", "flux_other", "flux_kontext", "flux_fill", "flux_control"),
    *("flux2_dev", "flux2_other", "chroma_radiance", "chroma_other", "cosmos", "lumina", "z_image_edit"),
)
_INSTEAD = {
    "vae": "give it as --vae beside a base model",
    "diffusers_unet": "give the folder that holds unet, vae and text_encoder",
    "unet": "give the complete checkpoint",
    "transformer": "give the folder that holds transformer, vae and the text encoders",
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
ANIMA_PREFIXES = ("net.", UNET_PREFIX, "diffusion_model.", "")
"""How the names in files of Anima begin: as its makers, ComfyUI and others write them."""
_ANIMA_MARKS = ("blocks.0.cross_attn.q_proj.weight", "x_embedder.proj.1.weight")
_ANIMA_INPUTS = 68  # columns of its first layer: 16 channels and a mask, four cells; more of models for video
Z_IMAGE_PREFIXES = (UNET_PREFIX, "diffusion_model.", "")
"""How the names in files of Z-Image begin."""
_Z_IMAGE_MARKS = ("cap_embedder.0.weight", "layers.0.adaLN_modulation.0.weight")  # Lumina-Image has the first alone
_SIGLIP_MARK = "siglip_embedder.0.weight"
_Z_IMAGE_PIPELINES = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
SD3_PREFIXES = (UNET_PREFIX, "diffusion_model.", "")
"""How the names in files of Stable Diffusion 3 begin."""
_SD3_MARK, _SD3_FIRST, _SD3_INPUTS = (
    "joint_blocks.0.context_block.adaLN_modulation.1.bias",
    "x_embedder.proj.weight",
    16,
)
_SD3_PIPELINES = tuple(f"StableDiffusion3{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
FLUX2_PREFIXES = (UNET_PREFIX, "diffusion_model.", "")
"""How the names in files of FLUX.2 begin."""
# of modulation that all blocks share, and of the embedding of a guidance, which klein lacks: original and diffusers'
_FLUX2_MARKS = ("single_stream_modulation.lin.weight", "single_stream_modulation.linear.weight")
_FLUX2_GUIDANCE = ("guidance_in.in_layer.weight", "time_guidance_embed.guidance_embedder.linear_1.weight")
_FLUX2_PIPELINES = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
_EDM_MARKS = {"edm_mean", "edm_std", "edm_vpred.sigma_max"}
# By what the class in a folder's model_index.json contains, the first that does
_PIPELINES = {
    "StableDiffusion3": "sd3_other", "Chroma": "chroma_other", "FluxKontext": "flux_kontext", "FluxFill": "flux_fill",
    "FluxControl": "flux_control", "Flux2Klein": "flux2_other", "Flux2": "flux2_dev", "Flux": "flux_other",
    "ZImage": "z_image_edit", "Lumina": "lumina",
}  # fmt: skip
_FLUX_PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline")
_CHROMA_PIPELINES = ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")
_FLUX_PREFIXES = (UNET_PREFIX, "")
_FLUX_INPUTS = {384: "flux_fill", 128: "flux_control"}  # columns of its first layer; 64 of the model itself
_REFINER_POOLED = 2560  # width of the refiner's added conditions; SDXL base: 2816
_SEVERAL = 3  # names shown of a file of no known kind


@dataclass(frozen=True)
class FileKind:
    """kind: a key of TITLES, "adapter" or "" if unknown. title: its name in messages, behind "is". adapter: its
    contents, if it is an adapter."""

    kind: str
    title: str
    adapter: AdapterContents | None = None


def kind_of_file(index: WeightsIndex) -> FileKind:
    """UserError for a file without tensors."""
    if not index.entries:
        raise UserError(f"{index.path}: holds no tensors")
    kind = next((kind for kind, starts in _BEFORE_ADAPTERS.items() if begins(index, *starts)), "")
    if not kind and any(".motion_modules." in name for name in index.entries):
        kind = "motion_module"
    if not kind and (adapter := describe({name: e.shape for name, e in index.entries.items()}, index.metadata)):
        return FileKind("adapter", adapter.title, adapter)
    if not kind and (family := claimed_by(index)):
        return FileKind(family.NAME, family.TITLE)
    kind = kind or _model(index) or _other(index)
    if kind:
        return FileKind(kind, TITLES[kind])
    some = ", ".join(sorted(index.entries)[:_SEVERAL])
    return FileKind(
        "", f"of no known kind ({len(index.entries)} tensors: {some}{', …' * (len(index.entries) > _SEVERAL)})"
    )


def families() -> list[type[ModelFamily]]:
    """All that there are, in the order of `library.models.FAMILIES`."""
    return [load_path(path, where="FAMILIES") for path in FAMILIES.values()]


def claimed_by(content: WeightsIndex | Folder) -> type[ModelFamily] | None:
    """The family whose model a file or a folder holds."""
    return next((family for family in families() if family.claims(content)), None)


def not_a_base(found: FileKind) -> str:
    """The reason why a file or folder cannot be the base model, to follow its path and "is"."""
    if found.kind in _UNSUPPORTED:
        known = (
            "Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, FLUX.1 dev and schnell, FLUX.2 klein, Chroma, Anima and Z-Image"
        )
        return f"{found.title}, which is not supported; this version trains {known}"
    instead = _INSTEAD.get(found.kind, "")
    if found.adapter is not None and found.adapter.is_plain:
        instead = "to train on from it, give it as --network_weights"
    return f"{found.title}, not a base model" + (f"; {instead}" if instead else "")


def begins(index: WeightsIndex, *prefixes: str) -> bool:
    """Whether the name of any tensor begins with one of these prefixes."""
    return any(name.startswith(prefixes) for name in index.entries)


def is_of_xl(content: WeightsIndex | Folder) -> bool:
    """Whether it is an SDXL model, a relative of it, or a part of one."""
    if isinstance(content, Folder):
        return "XL" in content.pipeline or (content.config("unet") or {}).get("addition_embed_type") == "text_time"
    return begins(content, "conditioner.embedders.") or _label(content) is not None


def _label(index: WeightsIndex) -> TensorEntry | None:
    """The layer for the condition of an SDXL UNet beside the text."""
    return next((entry for name, entry in index.entries.items() if name.endswith("label_emb.0.0.weight")), None)


def other_family(content: WeightsIndex | Folder) -> str:
    """The unsupported family that the model belongs to by its marks; "" for none."""
    if isinstance(content, Folder):
        if is_of_xl(content):
            pooled = (content.config("unet") or {}).get("projection_class_embeddings_input_dim")
            return "sdxl_refiner" if pooled == _REFINER_POOLED else ""
        ours = (*_FLUX_PIPELINES, *_FLUX2_PIPELINES, *_CHROMA_PIPELINES, *_Z_IMAGE_PIPELINES, *_SD3_PIPELINES)
        if content.pipeline in ours:
            return ""
        return next((kind for name, kind in _PIPELINES.items() if name in content.pipeline), "")
    if is_of_xl(content):
        label = _label(content)
        if label is not None and label.shape[-1] == _REFINER_POOLED:
            return "sdxl_refiner"
        return "edm" if content.entries.keys() & _EDM_MARKS else ""
    if _is_of_flux2(content):
        return "" if is_flux2(content) else "flux2_dev"
    if _has_flux_blocks(content):
        return _other_flux(content)
    if begins(content, "single_transformer_blocks.", "transformer_blocks.0.attn1.", "pos_embed.proj."):
        return "transformer"
    if begins(content, *(f"{prefix}joint_blocks." for prefix in SD3_PREFIXES)):
        return "" if is_sd3(content) else "sd3_other"
    if marks := _z_image_marks(content):
        return "z_image_edit" if _SIGLIP_MARK in marks else "" if _Z_IMAGE_MARKS[1] in marks else "lumina"
    return "cosmos" if _cosmos_inputs(content) not in (None, _ANIMA_INPUTS) else ""


def is_flux(content: WeightsIndex | Folder) -> bool:
    """Whether it is FLUX.1 dev or schnell, or one of their descendants."""
    if isinstance(content, Folder):
        return content.pipeline in _FLUX_PIPELINES
    return _has_flux_blocks(content) and not _is_chroma_file(content) and not _other_flux(content)


def is_chroma(content: WeightsIndex | Folder) -> bool:
    """Whether it is Chroma1: HD, Base, Flash or one of their descendants."""
    if isinstance(content, Folder):
        return content.pipeline in _CHROMA_PIPELINES
    return _has_flux_blocks(content) and _is_chroma_file(content) and not _other_flux(content)


def _has_flux_blocks(index: WeightsIndex) -> bool:
    """Whether it has the blocks of FLUX.1, and is not FLUX.2, which has such blocks as well."""
    return begins(index, *(f"{prefix}double_blocks." for prefix in _FLUX_PREFIXES)) and not _is_of_flux2(index)


def _is_chroma_file(index: WeightsIndex) -> bool:
    return begins(index, *(f"{prefix}distilled_guidance_layer." for prefix in _FLUX_PREFIXES))


def is_sd3(content: WeightsIndex | Folder) -> bool:
    """Whether it is Stable Diffusion 3 or 3.5."""
    if isinstance(content, Folder):
        return content.pipeline in _SD3_PIPELINES
    first = (
        content.entries.get(f"{own}{_SD3_FIRST}") for own in SD3_PREFIXES if f"{own}{_SD3_MARK}" in content.entries
    )
    return any(found is not None and found.shape[1:2] == (_SD3_INPUTS,) for found in first)


def is_flux2(content: WeightsIndex | Folder) -> bool:
    """Whether it is FLUX.2 klein, base or distilled, which no name or shape in a file tells apart."""
    if isinstance(content, Folder):
        return content.pipeline in _FLUX2_PIPELINES
    return _is_of_flux2(content) and not _has(content, _FLUX2_GUIDANCE)


def _is_of_flux2(index: WeightsIndex) -> bool:
    """Whether it is any version of FLUX.2."""
    return _has(index, _FLUX2_MARKS)


def _has(index: WeightsIndex, marks: tuple[str, ...]) -> bool:
    return any(prefix + mark in index.entries for prefix in FLUX2_PREFIXES for mark in marks)


def is_anima(content: WeightsIndex | Folder) -> bool:
    """Whether it is Anima, or the model of NVIDIA's for images that it descends from, which has no LLM adapter."""
    if isinstance(content, Folder):
        return content.config("text_conditioner") is not None and content.config("transformer") is not None
    return _cosmos_inputs(content) == _ANIMA_INPUTS


def is_z_image(content: WeightsIndex | Folder) -> bool:
    """Whether it is Z-Image, base or Turbo, which no name or shape tells apart."""
    if isinstance(content, Folder):
        return content.pipeline in _Z_IMAGE_PIPELINES
    marks = _z_image_marks(content)
    return _Z_IMAGE_MARKS[1] in marks and _SIGLIP_MARK not in marks


def _z_image_marks(index: WeightsIndex) -> set[str]:
    """The marks that a file of Z-Image or a relative has; empty for another one."""
    for prefix in Z_IMAGE_PREFIXES:
        if prefix + _Z_IMAGE_MARKS[0] in index.entries:
            return {mark for mark in (*_Z_IMAGE_MARKS, _SIGLIP_MARK) if prefix + mark in index.entries}
    return set()


def _cosmos_inputs(index: WeightsIndex) -> int | None:
    """The columns of the first layer of a Cosmos-Predict2 model; None for another file."""
    for prefix in ANIMA_PREFIXES:
        found = [index.entries.get(prefix + mark) for mark in _ANIMA_MARKS]
        if found[0] is not None and found[1] is not None:
            return found[1].shape[-1]
    return None


def _other_flux(index: WeightsIndex) -> str:
    """The relative of FLUX.1 or Chroma that a file with their blocks is; "" for these themselves.

    Kontext has the shapes of dev: only what its file is called, or says about itself, tells them apart.
    """
    if begins(index, *(f"{prefix}nerf_" for prefix in _FLUX_PREFIXES)):
        return "chroma_radiance"
    first = next((found for prefix in _FLUX_PREFIXES if (found := index.entries.get(f"{prefix}img_in.weight"))), None)
    if first is not None and len(first.shape) == 2 and first.shape[1] in _FLUX_INPUTS:
        return _FLUX_INPUTS[first.shape[1]]
    said = (index.path.stem, *(index.metadata.get(f"modelspec.{key}", "") for key in ("title", "architecture")))
    if any("kontext" in text.lower() for text in said):
        return "flux_kontext"
    norms = (f"{prefix}double_blocks.0.img_attn.norm.key_norm.scale" for prefix in _FLUX_PREFIXES)
    return "" if any(name in index.entries for name in norms) else "flux_other"


def _model(index: WeightsIndex) -> str:
    """A model of no family, or a part of one; "" where nothing is recognised."""
    other = other_family(index)
    if is_of_xl(index):
        whole = begins(index, UNET_PREFIX) and begins(index, "conditioner.embedders.")
        return other if whole or other == "sdxl_refiner" else "unet"
    if other:
        return other
    if begins(index, UNET_PREFIX):
        return "unet"
    if begins(index, "down_blocks.0.resnets.") and begins(index, "time_embedding."):
        return "diffusers_unet"
    if is_vae(index):
        return "vae"
    clip = ("text_model.", "embeddings.token_embedding.", "transformer.text_model.", "encoder.layers.0.self_attn")
    encoder = (*clip, "encoder.block.0.layer.", "model.embed_tokens.", "embed_tokens.")  # and T5, Qwen3
    return "text_encoder" if begins(index, *encoder) else ""


def _other(index: WeightsIndex) -> str:
    """The kind of a file that is neither a model nor an adapter."""
    names = index.entries
    if kind := next((kind for kind, starts in _AFTER_MODELS.items() if begins(index, *starts)), ""):
        return kind
    if all(name.partition(".")[0].isdecimal() for name in names):  # A1111 calls the layers of one after their widths
        return "hypernetwork"
    if names.keys() & {"emb_params", "clip_l", "clip_g", "*", "string_to_param.*"}:  # kohya's, A1111's, OneTrainer's
        return "embedding"
    (first, *more) = names.items()  # diffusers' have one tensor, called after its word
    return "embedding" if not more and "." not in first[0] and len(first[1].shape) in (1, 2) else ""


def is_vae(index: WeightsIndex) -> bool:
    """Whether a file holds a VAE, bare or as part of a checkpoint, in either naming."""
    marks = ("encoder.conv_in.weight", wan_vae.MARK)
    return any(name.removeprefix(VAE_PREFIX) in marks for name in index.entries)


def is_v2(unet: Config) -> bool:
    """Whether a UNet's configuration is that of 2.x: by the width of the text states, at unknown widths by its form."""
    return {768: False, 1024: True}.get(unet["cross_attention_dim"], bool(unet.get("use_linear_projection")))
