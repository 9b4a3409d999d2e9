"""A tiny Chroma with random weights: every layer and name that the true one has, at its true size of heads.

    python -m tests.tiny_chroma FOLDER

writes it as a diffusers folder. `original` turns weights into the original layout, written apart from
library.models.checkpoints.flux_names, so that each checks the other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from library.models.checkpoints.base_model import ASSETS
from tests import tiny_flux
from tests.tiny_anima import spread

DOUBLES, SINGLES, WIDTH, T5_WIDTH = tiny_flux.DOUBLES, tiny_flux.SINGLES, tiny_flux.WIDTH, tiny_flux.T5_WIDTH
APPROXIMATOR = "distilled_guidance_layer"


def configuration() -> dict[str, Any]:
    """Of the transformer, with FLUX.1's autoencoder and T5: fewer blocks, one head, narrower layers."""
    asset: dict[str, Any] = json.loads((ASSETS / "chroma.json").read_text(encoding="utf-8"))
    asset["transformer"] |= {"num_layers": DOUBLES, "num_single_layers": SINGLES, "num_attention_heads": 1}
    asset["transformer"] |= {"joint_attention_dim": T5_WIDTH}
    asset["transformer"] |= {"approximator_hidden_dim": 48, "approximator_layers": 2}
    of_flux = tiny_flux.configuration()
    return {**asset, "vae": of_flux["vae"], "text_encoder": of_flux["text_encoder_2"]}


def pipeline() -> Any:
    """diffusers' pipeline of diffusers' and transformers' own modules; the same bits each time."""
    from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    config = configuration()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ChromaPipeline(
            vae=AutoencoderKL.from_config(config["vae"]),
            text_encoder=T5EncoderModel(T5Config(**config["text_encoder"])),
            tokenizer=PreTrainedTokenizerFast(
                tokenizer_object=tiny_flux.t5_tokenizer(), eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
            ),
            transformer=ChromaTransformer2DModel.from_config(config["transformer"]),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        )
        spread(made.text_encoder.eval())  # T5 has dropout
        with torch.no_grad():
            # an untrained encoder's latents hardly vary; here they do about as much as the noise
            made.vae.encoder.conv_out.weight[:16] *= 8
            # as they are made, the gates are nearly shut, and what the blocks do would hardly show
            approximator = made.transformer.distilled_guidance_layer.out_proj
            approximator.weight *= 2
            approximator.bias.normal_(std=0.5)
    return made


def write(folder: Path) -> Path:
    """Write the model into `folder`; the same bits each time."""
    pipeline().save_pretrained(folder)
    return folder


def original(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The transformer's weights under their original names."""
    left, found = dict(states), {}
    for name in list(left):
        if name.startswith(APPROXIMATOR):
            new = name.replace("linear_1", "in_layer").replace("linear_2", "out_layer")
            found[new.replace("weight", "scale") if ".norms." in name else new] = left.pop(name)
    return {**found, **tiny_flux.original(left)}


def single_files(folder: Path, target: Path, *, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """The files that kohya's users have, by the options that name them: of the model in a diffusers folder. The
    transformer is of `dtype`."""
    target.mkdir(parents=True, exist_ok=True)
    transformer = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    t5 = load_file(folder / "text_encoder" / "model.safetensors")
    contents = {
        "pretrained_model_name_or_path": {
            name: tensor.to(dtype).contiguous() for name, tensor in original(transformer).items()
        },
        # the true files hold the table of tokens twice
        "t5xxl": {**t5, "encoder.embed_tokens.weight": t5["shared.weight"].clone()},
    }
    names = {"pretrained_model_name_or_path": "Chroma1-HD", "t5xxl": "t5xxl_fp16"}
    found = {}
    for option, tensors in contents.items():
        found[option] = target / f"{names[option]}.safetensors"
        save_file(tensors, found[option])
    # the autoencoder's size is in no file: the true one's needs no configuration
    return {**found, "ae": folder / "vae", "t5_tokenizer_path": folder / "tokenizer"}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
