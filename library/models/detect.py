"""What a weights file or a diffusers folder is, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from library.errors import UserError
from library.models.checkpoint import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX
from library.models.tensors import WeightsIndex

TITLES = {"sd": "a Stable Diffusion 1.x or 2.x model", "sdxl": "an SDXL model"}
_SUPPORTED = "this version trains Stable Diffusion 1.x, 2.x and XL"
# What else people give as a base model. "{path} is …" is how the message begins.
NOT_A_BASE = {
    "lora": "a LoRA or a similar adapter, not a base model; to train on from it, give it as --network_weights",
    "embedding": "a textual inversion embedding, not a base model",
    "controlnet": "a ControlNet, not a base model",
    "vae": "a VAE alone, not a base model; give it as --vae beside a base model",
    "text_encoder": "a text encoder alone, not a base model",
    "diffusers_unet": "the UNet of a diffusers folder; give the folder that holds unet, vae and text_encoder",
    "unet": "a UNet without a text encoder; give the complete checkpoint",
    "sdxl_refiner": f"the SDXL refiner, which is not supported; {_SUPPORTED}",
    "sd3": f"a Stable Diffusion 3 model, which is not supported; {_SUPPORTED}",
    "flux": f"a FLUX model, which is not supported; {_SUPPORTED}",
    "edm": f"an SDXL model of another kind (EDM, as Playground 2.5), which is not supported; {_SUPPORTED}",
}
_ADAPTER_ENDS = (".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", ".hada_w1_a", ".lokr_w1",
                 ".lokr_w1_a", ".lokr_w2", ".oft_blocks", ".a1.weight")  # fmt: skip
_ADAPTER_STARTS = ("lora_unet_", "lora_te")
_EDM_MARKS = {"edm_mean", "edm_std", "edm_vpred.sigma_max"}
_REFINER_POOLED = 2560  # width of the refiner's added conditions; SDXL base: 2816


def kind_of_file(index: WeightsIndex) -> str:
    """The family's name, as in FAMILIES, or a key of NOT_A_BASE. UserError where nothing is recognised."""
    names = index.entries

    def begins(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if begins(*_ADAPTER_STARTS) or any(name.endswith(_ADAPTER_ENDS) for name in names):
        return "lora"
    if begins("control_model.", "controlnet_", "input_hint_block.", "controlnet_cond_embedding."):
        return "controlnet"
    label = next((entry for name, entry in names.items() if name.endswith("label_emb.0.0.weight")), None)
    if begins("conditioner.embedders.") or label:
        if label and label.shape[-1] == _REFINER_POOLED:
            return "sdxl_refiner"
        if not begins(UNET_PREFIX) or not begins("conditioner.embedders."):
            return "unet"
        return "edm" if names.keys() & _EDM_MARKS else "sdxl"
    if begins("double_blocks.", f"{UNET_PREFIX}double_blocks.", "single_transformer_blocks."):
        return "flux"
    if begins("joint_blocks.", f"{UNET_PREFIX}joint_blocks."):
        return "sd3"
    if begins(UNET_PREFIX):
        return "sd" if begins(CLIP_PREFIX, OPEN_CLIP_PREFIX) else "unet"
    if begins("down_blocks.0.resnets.") and begins("time_embedding."):
        return "diffusers_unet"
    if is_vae(index):
        return "vae"
    if begins("text_model.", "embeddings.token_embedding.", "transformer.text_model.", "encoder.layers.0.self_attn"):
        return "text_encoder"
    if names.keys() & {"emb_params", "clip_l", "clip_g", "*"} or len(names) == 1:
        return "embedding"
    if not names:
        raise UserError(f"{index.path}: holds no tensors")
    raise UserError(
        f"{index.path}: no known kind of model; it holds {len(names)} tensors, {', '.join(sorted(names)[:3])} …"
    )


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
