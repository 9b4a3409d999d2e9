"""A tiny Stable Diffusion 2 with random weights: Linear projections, another text encoder, velocity.

    python -m tests.tiny_sd2 FOLDER

writes it as a diffusers folder without a tokenizer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from library.models.checkpoints.base_model import ASSETS


def write(folder: Path) -> Path:
    """Write the model into `folder`; the same bits each time."""
    import torch
    from safetensors.torch import save_file

    from library.models.modules import new_text_encoder, new_unet, new_vae

    asset = json.loads((ASSETS / "sd2.json").read_text(encoding="utf-8"))
    unet = asset["unet"] | {
        "block_out_channels": [16, 32],
        "norm_num_groups": 8,
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 48,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    vae = asset["vae"] | {
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "scaling_factor": 0.5,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    text = asset["text_encoder"] | {"hidden_size": 48, "intermediate_size": 64}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    build = {"unet": (new_unet, unet), "vae": (new_vae, vae), "text_encoder": (new_text_encoder, text)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for part, (new, config) in build.items():
            (folder / part).mkdir(parents=True)
            (folder / part / "config.json").write_text(json.dumps(config))
            states = {n: torch.randn(p.shape) * 0.05 for n, p in new(config).named_parameters()}
            stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            save_file(states, folder / part / f"{stem}.safetensors")
    (folder / "scheduler").mkdir()
    scheduler = asset["scheduler"] | {"prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]))
