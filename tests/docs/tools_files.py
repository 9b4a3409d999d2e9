"""The model `tuned` that the commands of docs/tools.md name: the quickstart's base with a LoRA of the page in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.networks.tools.tool_files import deltas

UNET = Path("unet/diffusion_pytorch_model.safetensors")


def write_tuned(folder: Path) -> None:
    """Write `tuned` beside `output` of `folder`, with the UNet's layers of output/second.safetensors."""
    shutil.copytree(folder / "quickstart" / "base", folder / "tuned")
    weights = load_file(folder / "tuned" / UNET)
    more = deltas(load_file(folder / "output" / "second.safetensors"))
    for name, weight in weights.items():
        layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if layer in more:
            weights[name] = (weight.double() + more[layer].view(weight.shape)).to(torch.float32)
        else:
            weights[name] = weight.float()
    save_file(weights, folder / "tuned" / UNET)
