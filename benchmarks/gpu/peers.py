"""The peers on the same device: a bare training loop, with its own LoRA or with peft's, on diffusers' UNet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.bare_loop import inject
from benchmarks.gpu.models import Bench


class Peer:
    """One training step in plain torch: bf16 weights, adapters in fp32, autocast, AdamW, clipping at 1, one read."""

    def __init__(
        self, bench: Bench, kind: str, *, adapters: str, batch: int, checkpointing: bool, rank: int = 16
    ) -> None:
        """`adapters`: "bare" or "peft"."""
        self.device, self.kind = bench.device, kind
        self.unet = bench.unet(kind)
        config = self.unet.config
        self.parameters = {"bare": bare, "peft": with_peft}[adapters](self.unet, rank)
        for parameter in self.parameters:
            parameter.data = parameter.data.to(self.device, torch.float32)
        self.unet.train()
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        size = bench.resolution(kind) // 8
        with torch.device(self.device):
            self.latents = torch.randn(8, batch, 4, size, size)
            self.text = torch.randn(8, batch, 77, config.cross_attention_dim)
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
            self.alphas = torch.cumprod(1 - betas, 0)
            self.added = None
            if kind == "sdxl":
                width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
                self.added = {"text_embeds": torch.randn(batch, width), "time_ids": torch.full((batch, 6), 1024)}
        self.count = 0

    def step(self) -> float:
        """Make a step on the next of eight batches."""
        index, self.count = self.count % 8, self.count + 1
        latents = self.latents[index]
        t = torch.randint(0, 1000, (len(latents),), device=self.device)
        noise, a = torch.randn_like(latents), self.alphas[t].view(-1, 1, 1, 1)
        with torch.autocast(self.device.type, torch.bfloat16):
            noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
            prediction = self.unet(noisy, t, self.text[index], added_cond_kwargs=self.added).sample
        loss = nn.functional.mse_loss(prediction.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def bare(unet: nn.Module, rank: int) -> list[nn.Parameter]:
    adapters = inject(unet, {"Transformer2DModel"}, rank=rank, alpha=rank)
    return [parameter for adapter in adapters for parameter in adapter.parameters()]


def with_peft(unet: nn.Module, rank: int) -> list[nn.Parameter]:
    """peft's LoRA on the same layers."""
    from peft import LoraConfig, inject_adapter_in_model

    blocks = [name for name, module in unet.named_modules() if type(module).__name__ == "Transformer2DModel"]
    layers = [
        name
        for name, module in unet.named_modules()
        if any(name.startswith(f"{block}.") for block in blocks) and isinstance(module, nn.Linear | nn.Conv2d)
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), unet)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def seconds(bench: Bench, step: Callable[[], object], *, warmup: int, steps: int) -> float:
    """A step's mean, of `steps` that are queued one behind the other after those that warm up."""
    import time

    for _ in range(warmup):
        step()
    bench.settled()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    bench.settled()
    return (time.perf_counter() - start) / steps
