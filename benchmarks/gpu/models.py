"""Stable Diffusion 1.5 and XL with random weights, made on the device: as folders for us, as UNets for the peers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.step_time import image_folder
from library.models import modules
from library.models.checkpoints.base_model import ASSETS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Configs = dict[str, dict[str, Any]]  # by part: the keyword arguments of a class of diffusers or transformers

PARTS = {
    "unet": modules.new_unet,
    "vae": modules.new_vae,
    "text_encoder": modules.new_text_encoder,
    "text_encoder_2": modules.new_projected_text_encoder,
}


@dataclass(frozen=True)
class Bench:
    """The folders, the device and the size: with `tiny` the code runs on a CPU in a minute."""

    folder: Path
    device: torch.device
    tiny: bool

    def resolution(self, kind: str) -> int:
        return 64 if self.tiny else {"sd15": 512, "sdxl": 1024}[kind]

    def steps(self, wanted: int) -> int:
        """The number of measured steps, after those that warm up."""
        return 2 if self.tiny else wanted

    def images(self) -> Path:
        """Captioned images for --train_data_dir: eight, or 32 for the encoding benchmark."""
        return image_folder(self.folder / "images", count=8 if self.tiny else 32)

    def model(self, kind: str) -> Path:
        """The diffusers folder of "sd15" or "sdxl", in bf16, written at the first call."""
        folder = self.folder / f"{kind}{'-tiny' * self.tiny}"
        if not (folder / "scheduler").exists():
            write(folder, configuration(kind, tiny=self.tiny), self.device)
        return folder

    def unet(self, kind: str) -> UNet2DConditionModel:
        """The UNet alone, in bf16 on the device, frozen."""
        unet = modules.new_unet(configuration(kind, tiny=self.tiny)["unet"])
        unet = unet.to(torch.bfloat16).to_empty(device=self.device).requires_grad_(False)
        for name, parameter in unet.named_parameters():
            parameter.copy_(random_weight(name, parameter, self.device))
        return unet

    def settled(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """The most bytes held since `forget_peak`; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def configuration(kind: str, *, tiny: bool) -> Configs:
    """The configurations of every part and of the scheduler."""
    file = ASSETS / f"{ {'sd15': 'sd1', 'sdxl': 'sdxl'}[kind] }.json"
    config: Configs = json.loads(file.read_text(encoding="utf-8"))
    return shrunk(config) if tiny else config


def shrunk(config: Configs) -> Configs:
    """The same blocks with 32 channels at the most."""
    unet, encoders = config["unet"], [part for part in ("text_encoder", "text_encoder_2") if part in config]
    unet |= {"sample_size": 8, "norm_num_groups": 8, "cross_attention_dim": 32 * len(encoders)}
    unet["block_out_channels"] = [16, *[32] * (len(unet["block_out_channels"]) - 1)]
    if len(encoders) == 2:
        unet |= {"transformer_layers_per_block": [1, 1, 2], "attention_head_dim": [2, 4, 4]}
        unet |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24 + 6 * 8}
    else:
        unet["attention_head_dim"] = 4
    config["vae"] |= {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64}
    for part in encoders:
        config[part] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "projection_dim": 24}
        config[part] |= {"num_attention_heads": 4}
    return config


@torch.no_grad()
def write(folder: Path, config: Configs, device: torch.device) -> None:
    """A diffusers folder of these parts in bf16."""
    from safetensors.torch import save_file

    for part, new in PARTS.items():
        if part not in config:
            continue
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config[part]), encoding="utf-8")
        weights = {
            name: random_weight(name, parameter, device).cpu()
            for name, parameter in new(config[part]).named_parameters()
        }
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        save_file(weights, folder / part / f"{stem}.safetensors", {"format": "pt"})
    (folder / "scheduler").mkdir()  # the last: a folder without it is half written
    text = json.dumps({**config["scheduler"], "prediction_type": "epsilon"})
    (folder / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")


def random_weight(name: str, like: Tensor, device: torch.device) -> Tensor:
    """bf16: norms 1, biases 0, all others small."""
    weight = torch.zeros(like.shape, dtype=torch.bfloat16, device=device)
    if like.ndim > 1:
        return weight.normal_(std=0.02)
    return weight.fill_(1) if name.endswith("weight") else weight
