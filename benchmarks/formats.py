"""What each format of frozen weights costs: loading, host memory, bytes, and the time of a training step.

    python -m benchmarks.formats [--folder output/sd15] [--pairs 10] [--only nf4]
    python -m benchmarks.formats --sdxl [--folder output/sdxl]          # needs about 12 GiB of free memory

Loading is that of the UNet alone, from a diffusers folder, in a process of its own: the peak is the resident memory
beside that after the imports. A step is of rank 8, batch 1, --resolution px, cached latents and captions, in bf16; each
format in turns with plain bf16 in one process, and nf4 in turns with peft's LoRA on bitsandbytes' Linear4bit, whose
convolutions stay in bf16. The models have random weights and are made at the first call.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.common import header, interleaved, row, sd15_folder
from benchmarks.peak_memory import measured
from benchmarks.sdxl_memory import model_folder
from benchmarks.step_time import image_folder, words
from library.quantization import FORMATS

PLAIN = "bf16"
CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs", "--mixed_precision", "bf16")


def load_unet(folder: Path, format: str) -> dict[str, float]:
    """Load the UNet in this process: seconds, and GiB of its weights and of resident memory at most."""
    import resource

    import torch

    from library.guidance.estimate import parameter_bytes
    from library.models.modules import new_unet
    from library.models.opening import open_family
    from library.quantization.frozen import Held

    family = open_family(str(folder))
    new_unet(family.components.config("denoiser"))  # its imports
    held = None if format == PLAIN else Held(format, "--base_format")
    if format == "nf4":
        import bitsandbytes  # noqa: F401
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    unet = family.components.load("denoiser", torch.bfloat16, "cpu", held=held)
    seconds = time.perf_counter() - start
    if format == PLAIN:
        for weight in unet.parameters():
            weight.sum()  # it is mapped, and takes memory when it is read
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "weights": parameter_bytes([unet]) / 2**30, "peak": peak - before}


def loading(folder: Path, formats: list[str]) -> None:
    print("| format | weights, GiB | host memory at most while loading, GiB | loading, s |\n|---|---|---|---|")
    for format in formats:
        found = measured("-m", "benchmarks.formats", "--load", format, "--folder", str(folder))
        print(f"| {format} | {found['weights']:.3f} | {found['peak']:.2f} | {found['seconds']:.1f} |", flush=True)


def trainer(folder: Path, resolution: int, format: str) -> Callable[[], object]:
    """Our training step, of a run that is made as the command line makes it."""
    from accelerate.state import AcceleratorState

    from library.config.parser import parse
    from library.run.build import build
    from library.run.plan import make_plan
    from library.training import loop

    AcceleratorState._reset_state(reset_partial_state=True)
    more = () if format == PLAIN else ("--base_format", format)
    with tempfile.TemporaryDirectory() as temporary:
        data = image_folder(Path(temporary) / "data")
        run = build(make_plan(parse([*words(folder, data, Path(temporary), resolution), *CACHED, *more])))
        steps = cycle([item for item, _ in zip(loop.step_batches(run), range(8), strict=False)])
    return lambda: loop.optimizer_step(run, next(steps))


class PeftLoop:
    """The peer: peft's LoRA on bitsandbytes' Linear4bit, in plain torch. `step()` is one training step."""

    def __init__(self, folder: Path, resolution: int) -> None:
        import torch
        from bitsandbytes.nn import Linear4bit, Params4bit
        from diffusers import UNet2DConditionModel
        from peft import LoraConfig, inject_adapter_in_model
        from torch import nn

        torch.manual_seed(42)
        unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.bfloat16)
        unet.requires_grad_(False).train()
        paths = [
            f"{path}.{inner}"
            for path, block in unet.named_modules()
            if type(block).__name__ == "Transformer2DModel"
            for inner, layer in block.named_modules()
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
        ]
        for path in paths:
            layer = unet.get_submodule(path)
            if isinstance(layer, nn.Linear):
                own: Any = Linear4bit(
                    *(layer.in_features, layer.out_features, layer.bias is not None),
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
                own.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                own.bias = layer.bias
                owner, _, leaf = path.rpartition(".")
                setattr(unet.get_submodule(owner), leaf, own.to("cpu"))
        config = LoraConfig(r=8, lora_alpha=4, target_modules=paths)
        self.unet: Any = inject_adapter_in_model(config, unet)
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.size, self.width = resolution // 8, unet.config.cross_attention_dim
        self.more: dict[str, Any] = {}
        if unet.config.addition_embed_type == "text_time":
            pooled, ids = torch.randn(1, 1280), torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]])
            self.more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}

    def step(self) -> None:
        import torch

        latents, noise = torch.randn(2, 1, 4, self.size, self.size)
        t, text = torch.randint(0, 1000, (1,)), torch.randn(1, 77, self.width)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = self.unet(latents + noise, t, text, **self.more).sample
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def steps(folder: Path, formats: list[str], resolution: int, pairs: int) -> None:
    plain = trainer(folder, resolution, PLAIN)
    print("\n" + header("ours, s", "the other, s"))
    for format in formats:
        if format == PLAIN:
            continue
        ours = trainer(folder, resolution, format)
        print(row(f"{format} against {PLAIN}", interleaved(ours, plain, pairs=pairs)), flush=True)
        if format == "nf4":
            peer = PeftLoop(folder, resolution)
            print(row("nf4 against peft + bitsandbytes", interleaved(ours, peer.step, pairs=pairs)), flush=True)
            del peer
        del ours
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdxl", action="store_true", help="SDXL's size instead of SD 1.5's")
    parser.add_argument("--folder", type=Path, help="the model (default: output/sd15, output/sdxl)")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--only", choices=FORMATS, action="append", help="formats beside bf16 (default: all)")
    parser.add_argument("--what", choices=("loading", "steps"), help="one of the two tables (default: both)")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder or Path("output/sdxl" if options.sdxl else "output/sd15")
    if options.load:
        print(json.dumps(load_unet(folder, options.load)))
        return
    model = model_folder(folder.resolve()) if options.sdxl else sd15_folder(folder)
    formats = [PLAIN, *(options.only or FORMATS)]
    if options.what != "steps":
        loading(model, formats)
    if options.what != "loading":
        steps(model, formats, options.resolution, options.pairs)


if __name__ == "__main__":
    main()
