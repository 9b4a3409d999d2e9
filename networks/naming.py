"""Other programs' names for the tensors of a LoRA, turned into kohya's, and back.

Five ways to write `W x + alpha / r * up(down(x))` occur in files for Stable Diffusion:

* kohya: `lora_unet_down_blocks_0_….lora_down.weight`, `.lora_up.weight`, `.alpha`;
* PEFT: `base_model.model.down_blocks.0.….lora_A.weight`, `.lora_B.weight`; alpha in `adapter_config.json` beside;
* diffusers: `unet.….lora.down.weight`, or PEFT's ends behind `unet.`; older files name the attention's processor
  (`….attn1.processor.to_q_lora.down.weight`). alpha, if any, in the file's metadata under `lora_adapter_metadata`;
* OneTrainer: kohya's ends and alpha behind `lora_unet.`, `lora_te1.` and the path with its dots, or, as its newer files
  have it, behind `unet.input_blocks.1.1.…`, `clip_l.`, `clip_g.`: the UNet's layers have their original names then;
* ComfyUI: the original names behind `diffusion_model.` and `text_encoders.clip_l.transformer.`, mostly without alpha.

Nothing here needs the model: names of Stable Diffusion's layers are the same in all of them but for dots, and the
original names of a UNet's layers. SDXL's UNet has those in kohya's files as well. Where a file does not tell that it is
for SDXL, that is settled when the model is known (`sites.in_names_of`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.files.json_text import Config, parse_json
from library.models.checkpoints.adapter_file import KOHYA_PREFIXES
from library.models.checkpoints.checkpoint import original_unet_name, unet_name

# (ending, what it is in kohya's files); PEFT may put the adapter's name before "weight"
_ENDINGS = (
    (re.compile(r"\.lora_down\.weight"), "lora_down.weight"),
    (re.compile(r"\.lora_up\.weight"), "lora_up.weight"),
    (re.compile(r"\.lora_A(?:\.\w+)?\.weight"), "lora_down.weight"),
    (re.compile(r"\.lora_B(?:\.\w+)?\.weight"), "lora_up.weight"),
    (re.compile(r"(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight"), "lora_down.weight"),
    (re.compile(r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight"), "lora_up.weight"),
    (re.compile(r"\.alpha"), "alpha"),
)
_WRAPPER = "base_model.model."
# How the names of a part's tensors begin, by the program that writes them
_PARTS = {
    "unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
    "lora_unet.": "unet", "lora_te.": "text_encoder", "lora_te1.": "text_encoder", "lora_te2.": "text_encoder_2",
    "clip_l.": "text_encoder", "clip_g.": "text_encoder_2", "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder", "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}  # fmt: skip
_OF_SDXL = "lora_te1."  # a prefix that OneTrainer has for SDXL only
_UNET_PATH = re.compile(r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding)\b.*")
_LAYERS_PER_BLOCK = 2  # of SDXL's UNet
# The words of paths that have underscores of their own
_WORDS = re.compile(
    r"(?:input|output|down|up|transformer)_blocks|(?:middle|mid)_block|(?:in|out|emb)_layers|skip_connection|"
    r"time_emb_proj|conv_(?:shortcut|in|out)|proj_(?:in|out)|to_(?:q|k|v|out)|text_model|self_attn|(?:q|k|v|out)_proj|"
    r"[a-z0-9]+"
)
_ONLY_SDXL = re.compile(r"\.transformer_blocks\.[1-9]")  # of the others, each attention has but one
_PROJECTION = "text_projection"  # of SDXL's second text encoder, which OneTrainer adapts
_TEXT_PATH = re.compile(r"(?:text_model\.)?(?:encoder|embeddings|final_layer_norm)\b.*")
# the attention layers of a text encoder in the oldest files are called as a UNet's
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class _Place:
    """The layer that a tensor belongs to: part "unet", "text_encoder" or "text_encoder_2" and the path below it, in
    diffusers' names and without "text_model."."""

    part: str
    path: str


def to_kohya(tensors: Mapping[str, Tensor], *, config: Config | None = None, source: str) -> dict[str, Tensor]:
    """The tensors of another program's file under kohya's names, each layer with its alpha.

    `config`: what stands beside the tensors about their scale: PEFT's adapter_config.json, or the content of diffusers'
    `lora_adapter_metadata`. Without one alpha is the rank, as both programs have it. Raises UserError for a tensor
    that is no part of a low-rank pair (DoRA's magnitudes, biases), because the pairs alone would act differently.
    """
    found: dict[_Place, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        place, kind = _read(key, source)
        if found.setdefault(place, {}).setdefault(kind, tensor) is not tensor:
            raise UserError(f"{source}: two tensors for one layer's {kind}; the second is {key}")
    xl = any(place.part == "text_encoder_2" or _ONLY_SDXL.search(place.path) for place in found)
    xl = xl or any(key.startswith(_OF_SDXL) for key in tensors)
    converted: dict[str, Tensor] = {}
    for place, own in found.items():
        lacking = {"lora_down.weight", "lora_up.weight"} - own.keys()
        if lacking:
            raise UserError(f"{source}: {place.part}.{place.path} has no {lacking.pop()}")
        rank = own["lora_down.weight"].shape[0]
        own.setdefault("alpha", torch.tensor(_alpha(config or {}, place, rank, source)))
        name = _kohya_name(place, xl=xl)
        converted |= {f"{name}.{kind}": tensor for kind, tensor in own.items()}
    return converted


def _read(key: str, source: str) -> tuple[_Place, str]:
    """Which layer a tensor belongs to, and what it is there, in kohya's words."""
    for ending, kind in _ENDINGS:
        match = ending.search(key)
        if match and match.end() == len(key):
            return _place(key[: match.start()], key, source, old=match[0].startswith("_lora")), kind
    raise UserError(f"{source}: {key} belongs to no low-rank pair; a file that holds more than pairs is not supported")


def _place(path: str, key: str, source: str, *, old: bool) -> _Place:
    prefix = next((prefix for prefix in _PARTS if path.startswith(prefix)), "")
    part = _PARTS.get(prefix)
    path = path.removeprefix(prefix).removeprefix(_WRAPPER).replace(".processor.", ".")
    if part in ("unet", None):  # original names of a UNet's layers, which are no one else's, become diffusers'
        path = unet_name(f"{path}.weight", layers_per_block=_LAYERS_PER_BLOCK).removesuffix(".weight")
    if part is None:
        part = "unet" if _UNET_PATH.fullmatch(path) else "text_encoder" if _TEXT_PATH.fullmatch(path) else None
    if part is None:
        raise UserError(f"{source}: {key} names neither a UNet's layer nor a text encoder's")
    if part == "unet":
        if old and path.endswith(".to_out"):
            path += ".0"
        return _Place(part, path)
    above, dot, last = path.removeprefix("text_model.").rpartition(".")
    return _Place(part, f"{above}{dot}{_OLD_TEXT.get(last, last)}")


def _kohya_name(place: _Place, *, xl: bool) -> str:
    if place.part == "unet":
        block = re.match(r"(?:down_blocks|mid_block|up_blocks)\.", place.path)
        path = original_unet_name(place.path, layers_per_block=_LAYERS_PER_BLOCK) if xl and block else place.path
        return "lora_unet_" + path.replace(".", "_")
    number = {"text_encoder": "1" if xl else "", "text_encoder_2": "2"}[place.part]
    above = "" if place.path == _PROJECTION else "text_model_"  # it lies beside the text model
    return f"lora_te{number}_{above}" + place.path.replace(".", "_")


def _alpha(config: Config, place: _Place, rank: int, source: str) -> float:
    """The layer's alpha, by which kohya's programs scale as alpha / rank."""
    try:
        # diffusers keeps one configuration a part in one table, "unet.lora_alpha"; PEFT's file has one only
        own = {key.removeprefix(f"{place.part}."): value for key, value in config.items()}
        alpha = own.get("lora_alpha")
        for pattern, value in (own.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern.removeprefix('text_model.')})", place.path):
                alpha = value
                break  # PEFT takes the first that matches
        if alpha is None:
            return float(rank)
        # rank-stabilised LoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023)
        return float(alpha) * (rank**0.5 if own.get("use_rslora") else 1.0)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{source}: its LoRA configuration cannot be read: {error}") from error


def to_diffusers(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The tensors of a kohya file under diffusers' names, `unet.….lora_A.weight`, as `load_lora_weights` takes them.

    These files have no alpha, so the scale goes into lora_B: exactly if alpha / rank is a power of two, else rounded
    once. Raises UserError for a file that holds more than low-rank pairs.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.partition(".")
        if kind not in ("lora_down.weight", "lora_up.weight", "alpha"):
            raise UserError(f"{source}: {key} is no part of a plain LoRA; only those have names in diffusers")
        modules.setdefault(name, {})[kind] = tensor
    converted: dict[str, Tensor] = {}
    for name, own in modules.items():
        lacking = {"lora_down.weight", "lora_up.weight"} - own.keys()
        if lacking:
            raise UserError(f"{source}: {name} has no {lacking.pop()}")
        down, up = own["lora_down.weight"], own["lora_up.weight"]
        scale = float(own["alpha"]) / len(down) if "alpha" in own else 1.0
        place = diffusers_path(name, source=source)
        converted |= {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": (up.float() * scale).to(up.dtype)}
    return converted


def diffusers_path(name: str, *, source: str) -> str:
    """For example lora_unet_input_blocks_4_1_proj_in → unet.down_blocks.1.attentions.0.proj_in. Raises UserError."""
    parts = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
    for prefix, part in {**parts, "lora_te2_": "text_encoder_2"}.items():
        if name.startswith(prefix):
            path = ".".join(_WORDS.findall(name.removeprefix(prefix)))
            if re.match(r"(?:input_blocks|middle_block|output_blocks)\.", path):
                path = unet_name(f"{path}.weight", layers_per_block=_LAYERS_PER_BLOCK).removesuffix(".weight")
            return f"{part}.{path}"
    raise UserError(f"{source}: {name} is not one of kohya's names, which begin with {', '.join(KOHYA_PREFIXES)}")


def read_config(text: str, where: str) -> dict[str, Any]:
    """A LoRA configuration in JSON."""
    config = parse_json(text, where)
    if not isinstance(config, dict):
        raise UserError(f"{where}: is not a table of settings")
    return config
