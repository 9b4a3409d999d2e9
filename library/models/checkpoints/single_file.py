"""Base models as one file in the original layout. Such a file has no configurations and tokenizer: these ship here."""

from __future__ import annotations

import logging
from pathlib import Path

from library.errors import UserError
from library.files.index import read_index
from library.files.json_text import Config
from library.files.tensors import WeightsIndex
from library.models.checkpoints.base_model import ASSETS, ZERO_TERMINAL, BaseModel, Part, few, read_json
from library.models.checkpoints.checkpoint import (
    EMA_PREFIX,
    TEXT_PREFIXES,
    UNET_PREFIX,
    VAE_PREFIX,
    strip,
    text_entries_of,
    unet_entries,
    vae_entries,
)
from library.models.checkpoints.detect import is_vae, kind_of_file

logger = logging.getLogger(__name__)

_FIRST_CONV = f"{UNET_PREFIX}input_blocks.0.0.weight"
_CONTEXT = ".transformer_blocks.0.attn2.to_k.weight"
_ASSETS = {("sd", 768): "sd1", ("sd", 1024): "sd2", ("sdxl", 2048): "sdxl"}  # by the width of the text states
_KNOWN = {
    "sd": "Stable Diffusion 1.x (320, 4, 768) nor 2.x (320, 4, 1024)",
    "sdxl": "that of SDXL (320, 4, 2048) nor of another model that is supported",
}
_WIDTH = 320  # channels of the first convolution of all of them
_OTHER_INPUTS = {9: "an inpainting model", 8: "an instruction-editing model", 5: "a depth-to-image model"}
# empty tensors that models carry by convention (ComfyUI, NoobAI)
_V_PREDICTION_MARK, _ZERO_TERMINAL_MARK = "v_pred", "ztsnr"


def open_file(path: str, location: Path, *, kind: str, config: Config | None = None) -> BaseModel:
    """Read the names and shapes in the checkpoint of a model of the family "sd" or "sdxl". Raises UserError.

    `config`, in the form of assets/sd1.json, takes the place of the shipped ones: for architectures of other sizes,
    whose number of attention heads no file tells.
    """
    index = read_index(location)
    config = config or read_json(ASSETS / f"{_asset(index, kind)}.json")
    _mention_leftovers(index, kind)
    layers_per_block = config["unet"]["layers_per_block"]
    parts = {
        "denoiser": Part(
            config["unet"],
            f"the UNet in {path}",
            lambda: unet_entries(index.entries, layers_per_block=layers_per_block),
        )
    }
    for part, prefixes in TEXT_PREFIXES[kind].items():
        parts[part] = _text_encoder_part(index, part, prefixes, config[part], path)
    if strip(index.entries, VAE_PREFIX):
        parts["vae"] = Part(config["vae"], f"the VAE in {path}", lambda: vae_entries(index.entries))
    prediction, stated_by = _stated_prediction(index)
    scheduler = config["scheduler"]
    if _ZERO_TERMINAL_MARK in index.entries:
        logger.info(
            "%s has a noise schedule that ends in pure noise, according to its tensor '%s'", path, _ZERO_TERMINAL_MARK
        )
        scheduler = scheduler | ZERO_TERMINAL
    tokenizer = ASSETS / "clip_tokenizer", config["tokenizer"]
    return BaseModel(kind, path, location, parts, scheduler, *tokenizer, prediction, stated_by)


def _text_encoder_part(index: WeightsIndex, part: str, prefixes: tuple[str, ...], config: Config, path: str) -> Part:
    own = {name: entry for name, entry in index.entries.items() if name.startswith(prefixes)}
    layers, entries = config["num_hidden_layers"], text_entries_of(part)
    return Part(config, f"the {part.replace('_', ' ')} in {path}", lambda: entries(own, layers=layers))


def vae_part_of_file(path: Path, config: Config) -> Part:
    """The VAE in a file of its own, or in a whole checkpoint."""
    index = read_index(path)
    if not is_vae(index):
        raise UserError(f"{path} is {kind_of_file(index).title}, and holds no VAE")
    return Part(config, f"the VAE in {path}", lambda: vae_entries(index.entries))


def _asset(index: WeightsIndex, kind: str) -> str:
    """sd1, sd2 or sdxl, or a UserError that says what the UNet is instead."""
    conv = index.entries.get(_FIRST_CONV)
    context = next((entry for name, entry in index.entries.items() if name.endswith(_CONTEXT)), None)
    if conv is None or context is None or len(conv.shape) != 4 or len(context.shape) != 2:
        raise UserError(f"{index.path}: its UNet is not that of Stable Diffusion 1.x, 2.x or XL")
    width, inputs = conv.shape[:2]
    if inputs in _OTHER_INPUTS and width == _WIDTH:
        raise UserError(f"{index.path} is {_OTHER_INPUTS[inputs]} ({inputs} input channels), which is not supported")
    if width != _WIDTH or inputs != 4 or (kind, context.shape[1]) not in _ASSETS:
        raise UserError(
            f"{index.path}: its UNet, {width} channels wide with {inputs} input channels and text states of "
            f"{context.shape[1]}, is neither {_KNOWN[kind]}; a file does "
            "not hold its configuration, so a model of another size must be given as a diffusers folder"
        )
    return _ASSETS[kind, context.shape[1]]


def _stated_prediction(index: WeightsIndex) -> tuple[str | None, str]:
    """The prediction type that the file names, and the place; it cannot be seen in the weights."""
    if _V_PREDICTION_MARK in index.entries:
        return "v_prediction", f"its tensor '{_V_PREDICTION_MARK}'"
    stated = index.metadata.get("modelspec.prediction_type", "").lower()
    if stated in ("v", "v_prediction"):
        return "v_prediction", "its metadata, modelspec.prediction_type"
    if stated == "epsilon":
        return "epsilon", "its metadata, modelspec.prediction_type"
    return None, ""


def _mention_leftovers(index: WeightsIndex, kind: str) -> None:
    """Log the tensors of the file that are not used, except the noise schedule's tables, which have no prefix."""
    known = (UNET_PREFIX, VAE_PREFIX, *(prefix for prefixes in TEXT_PREFIXES[kind].values() for prefix in prefixes))
    if any(name.startswith(EMA_PREFIX) for name in index.entries):
        logger.info("%s also holds averaged (EMA) weights; they are not used", index.path)
    rest = [n for n in index.entries if "." in n and not n.startswith((*known, EMA_PREFIX))]
    # cond_stage_model.logit_scale and the like: parts of the text encoder's own training
    rest = [n for n in rest if not n.startswith("cond_stage_model.")]
    if rest:
        logger.warning("%s: %d tensors of no known part are ignored: %s", index.path, len(rest), few(rest, 3))
