"""A tiny Z-Image with random weights: every layer and name that the true one has, at its true size of heads.

    python -m tests.tiny_z_image FOLDER

writes it as a diffusers folder. `original` turns weights into the original layout: the opposite way of
library.models.checkpoints.z_image_names, written apart from it, so that each checks the other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from library.models.checkpoints.base_model import ASSETS
from tests import tiny_flux
from tests.tiny_anima import qwen_tokenizer, spread, weights_in

LAYERS, REFINERS, WIDTH, STATES, TEXT_LAYERS = 3, 1, 128, 32, 3
# The part of Qwen3's template that one user's turn takes
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def configuration() -> dict[str, Any]:
    """In the form of assets/z_image.json, with the autoencoder: fewer blocks, one head, narrower encoders."""
    asset: dict[str, Any] = json.loads((ASSETS / "z_image.json").read_text(encoding="utf-8"))
    asset["transformer"] |= {"dim": WIDTH, "n_layers": LAYERS, "n_refiner_layers": REFINERS, "n_heads": 1}
    asset["transformer"] |= {"n_kv_heads": 1, "cap_feat_dim": STATES}
    asset["text_encoder"] |= {"vocab_size": 128, "hidden_size": STATES, "intermediate_size": 64, "head_dim": 8}
    asset["text_encoder"] |= {"num_hidden_layers": TEXT_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {**asset, "vae": tiny_flux.configuration()["vae"]}


def tokenizer() -> Any:
    """Of letters, with the words of a chat."""
    from transformers import PreTrainedTokenizerFast

    made = qwen_tokenizer()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def pipeline() -> Any:
    """diffusers' pipeline of diffusers' and transformers' own modules; the same bits each time."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    config = configuration()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ZImagePipeline(
            vae=AutoencoderKL.from_config(config["vae"]),
            text_encoder=Qwen3Model(Qwen3Config(**config["text_encoder"])),
            tokenizer=tokenizer(),
            transformer=ZImageTransformer2DModel.from_config(config["transformer"]),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        spread(made.text_encoder)
        with torch.no_grad():
            for token in (made.transformer.x_pad_token, made.transformer.cap_pad_token):
                token.normal_()  # zeros, as they are made, would hide a wrong place
            # an untrained encoder's latents hardly vary; here they do about as much as the noise
            made.vae.encoder.conv_out.weight[:16] *= 8
            # behind a norm, the last layer as it is made is too small for velocities of that size
            made.transformer.all_final_layer["2-1"].linear.weight *= 3
    return made


def write(folder: Path) -> Path:
    """Write the model into `folder`; the same bits each time."""
    pipeline().save_pretrained(folder)
    return folder


def original(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The transformer's weights under their original names, with a tensor that true files have and no one uses."""
    left = dict(states)
    found: dict[str, torch.Tensor] = {"norm_final.weight": torch.zeros(WIDTH)}
    blocks = [f"layers.{i}" for i in range(LAYERS)]
    blocks += [f"{which}_refiner.{i}" for which in ("noise", "context") for i in range(REFINERS)]
    for block in blocks:
        attention = f"{block}.attention"
        found[f"{attention}.qkv.weight"] = torch.cat([left.pop(f"{attention}.to_{which}.weight") for which in "qkv"])
        found[f"{attention}.out.weight"] = left.pop(f"{attention}.to_out.0.weight")
        for which in "qk":
            found[f"{attention}.{which}_norm.weight"] = left.pop(f"{attention}.norm_{which}.weight")
    ends = {"all_x_embedder.2-1.": "x_embedder.", "all_final_layer.2-1.": "final_layer."}
    for name, tensor in left.items():
        new = next((short + name.removeprefix(long) for long, short in ends.items() if name.startswith(long)), name)
        found[new] = tensor
    return found


def single_files(
    folder: Path, target: Path, *, dtype: torch.dtype = torch.float32, prefix: str = ""
) -> dict[str, Path]:
    """The files that the model's users have, by the options that name them. The transformer is of `dtype`, its names
    behind `prefix`."""
    target.mkdir(parents=True, exist_ok=True)
    whole = original(weights_in(folder / "transformer"))
    text = weights_in(folder / "text_encoder")
    contents = {
        "pretrained_model_name_or_path": {f"{prefix}{name}": tensor.to(dtype) for name, tensor in whole.items()},
        "qwen3": {f"model.{name}": tensor for name, tensor in text.items()},
    }
    names = {"pretrained_model_name_or_path": "z_image_bf16", "qwen3": "qwen_3_4b"}
    found = {}
    for option, tensors in contents.items():
        found[option] = target / f"{names[option]}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, found[option])
    # the autoencoder's size is in no file: the true one's needs no configuration
    return {**found, "ae": folder / "vae", "qwen3_tokenizer_path": folder / "tokenizer"}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
