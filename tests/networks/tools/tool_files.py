"""Small LoRA files for the tests of the tools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
POINT = "lora_unet_down_blocks_0_attentions_0_proj_in"
WIDE = "lora_unet_mid_block_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SHAPES = {LINEAR: (12, 10), POINT: (8, 10, 1, 1), WIDE: (8, 6, 3, 3), TEXT: (9, 7)}


def tensors_of(
    seed: int, *, rank: int = 3, alpha: float | None = 2.0, names: Mapping[str, tuple[int, ...]] = SHAPES
) -> dict[str, Tensor]:
    """Random pairs for these layers."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in names.items():
        found[f"{name}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=generator)
        found[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A file with these tensors."""
    save_file(dict(tensors), path, dict(metadata or {"ss_base_model_version": "sd_v1"}))
    return path


def deltas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """alpha / r · up @ down of each layer, by the definition, fp64."""
    found = {}
    for key, up in tensors.items():
        if key.endswith(".lora_up.weight"):
            name = key.removesuffix(".lora_up.weight")
            down = tensors[f"{name}.lora_down.weight"].double()
            alpha = float(tensors.get(f"{name}.alpha", torch.tensor(len(down))))
            found[name] = alpha / len(down) * torch.einsum("or,rn->on", up.double().flatten(1), down.flatten(1))
    return found
