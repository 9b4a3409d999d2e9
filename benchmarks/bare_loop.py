"""The peer: a LoRA training step in plain torch, without any trainer.

    python -m benchmarks.bare_loop SD15_FOLDER --resolution 256 --steps 5 [--text_encoder] [--bf16]

Rank 8, alpha 4, on the UNet's 192 modules (and the text encoder's 72 with --text_encoder), random cached latents,
AdamW, clipping at 1. Prints the seconds until ready, per step, and the peak resident memory as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class BareLoRA(nn.Module):
    """up(down(x)) * alpha / rank added to a Linear or a 1×1 convolution, by replacing its forward."""

    def __init__(self, module: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        self.original, self.scale = module.forward, alpha / rank
        if isinstance(module, nn.Linear):
            self.down: nn.Module = nn.Linear(module.in_features, rank, bias=False)
            self.up: nn.Module = nn.Linear(rank, module.out_features, bias=False)
        else:
            assert isinstance(module, nn.Conv2d)
            self.down = nn.Conv2d(module.in_channels, rank, 1, bias=False)
            self.up = nn.Conv2d(rank, module.out_channels, 1, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        vars(module)["forward"] = self.forward  # of this module alone

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x) + self.up(self.down(x)) * self.scale


def inject(root: nn.Module, classes: set[str], *, rank: int, alpha: float) -> list[BareLoRA]:
    """Wrap every Linear and 1×1 convolution inside modules of these class names."""
    blocks = [module for module in root.modules() if type(module).__name__ in classes]
    return [
        BareLoRA(module, rank, alpha)
        for block in blocks
        for module in block.modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]


class BareLoop:
    """Model, adapters and optimizer; `step()` is one training step on the next of eight cached latents."""

    def __init__(
        self, folder: Path, *, resolution: int, text_encoder: bool = False, bf16: bool = False, rank: int = 8
    ) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        torch.manual_seed(42)
        self.bf16 = bf16
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=dtype)
        self.unet.requires_grad_(False).train()
        adapters = inject(self.unet, {"Transformer2DModel"}, rank=rank, alpha=rank / 2)
        self.text_encoder = None
        if text_encoder:
            self.text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype)
            self.text_encoder.requires_grad_(False).train()
            adapters += inject(self.text_encoder, {"CLIPAttention", "CLIPMLP"}, rank=rank, alpha=rank / 2)
        self.parameters = [p for adapter in adapters for p in adapter.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        size = resolution // 8
        self.latents = [torch.randn(1, 4, size, size) for _ in range(8)]
        self.embeddings = [torch.randn(1, 77, self.unet.config.cross_attention_dim) for _ in range(8)]
        self.tokens = torch.randint(0, 49406, (8, 77))
        self.tokens[:, 0], self.tokens[:, -1] = 49406, 49407
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        self.alphas = torch.cumprod(1 - betas, 0)
        self.count = 0

    def step(self) -> float:
        index, self.count = self.count % 8, self.count + 1
        latent, t = self.latents[index], torch.randint(0, 1000, (1,))
        noise, a = torch.randn_like(latent), self.alphas[t].view(1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            condition = self.embeddings[index]
            if self.text_encoder is not None:
                condition = self.text_encoder(self.tokens[index : index + 1])[0]
            prediction = self.unet(a.sqrt() * latent + (1 - a).sqrt() * noise, t, condition).sample
        loss = nn.functional.mse_loss(prediction.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--text_encoder", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    import resource

    start = time.perf_counter()
    loop = BareLoop(options.folder, resolution=options.resolution, text_encoder=options.text_encoder, bf16=options.bf16)
    ready, seconds = time.perf_counter() - start, []
    for _ in range(options.steps):
        began = time.perf_counter()
        loop.step()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"ready_s": ready, "step_s": sorted(seconds)[len(seconds) // 2], "peak_gib": peak}))


if __name__ == "__main__":
    main()
