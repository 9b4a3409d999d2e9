"""A tiny SDXL with random weights: every layer and name that the true one has, in 16 MB.

    python -m tests.tiny_sdxl FOLDER

writes it as a diffusers folder; `single_file` writes such a folder as one file in the original layout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from library.models.checkpoints.base_model import ASSETS

TEXTS = {"text_encoder": (32, 3), "text_encoder_2": (40, 3)}  # width, layers
PROJECTION = 24


def configuration() -> dict[str, Any]:
    """In the form of assets/sdxl.json: its blocks and their kinds, fewer channels and layers."""
    asset: dict[str, Any] = json.loads((ASSETS / "sdxl.json").read_text(encoding="utf-8"))
    asset["unet"] |= {
        "sample_size": 8,
        "block_out_channels": [16, 32, 32],
        "norm_num_groups": 8,
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [2, 4, 4],
        "cross_attention_dim": sum(width for width, _ in TEXTS.values()),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": PROJECTION + 6 * 8,
    }
    asset["vae"] |= {
        "sample_size": 64,
        "block_out_channels": [8, 8, 8, 8],
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    for part, (width, layers) in TEXTS.items():
        asset[part] |= {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        asset[part] |= {"num_attention_heads": 4, "projection_dim": PROJECTION}
    return asset


def write(folder: Path) -> Path:
    """Write the model into `folder`; the same bits each time."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    config = configuration()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
            vae=AutoencoderKL.from_config(config["vae"]),
            text_encoder=CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])),
            tokenizer=CLIPTokenizer.from_pretrained(ASSETS / "clip_tokenizer"),
            tokenizer_2=CLIPTokenizer.from_pretrained(ASSETS / "clip_tokenizer", pad_token="!"),
            unet=UNet2DConditionModel.from_config(config["unet"]),
            scheduler=EulerDiscreteScheduler.from_config(config["scheduler"]),
            add_watermarker=False,
        )
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            # transformers initialises so weakly that all prompts would look alike
            for name, parameter in encoder.named_parameters():
                if parameter.ndim == 2:
                    torch.nn.init.normal_(parameter, std=0.3 if "embedding" in name else parameter.shape[1] ** -0.5)
    pipeline.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]))
