"""The time of an optimizer step, and the bytes of its state, on the LoRA of an SD 1.5 UNet.

    python -m benchmarks.optimizer_step                      # everything at ranks 8, 16 and 32: some minutes
    python -m benchmarks.optimizer_step --quick              # rank 16, ours and the baseline: half a minute
    python -m benchmarks.optimizer_step --only adamw8bit,ours --ranks 16 --rounds 30
    python -m benchmarks.optimizer_step --training_step 512  # also the share of a whole training step at 512 px

In every round each optimizer makes one step, so that disturbances of the machine affect all alike; the ratio is the
median over the rounds of time / time of torch's fused AdamW in that round. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.bare_loop import inject
from benchmarks.common import quartiles
from library.config.registry import Arguments

Named = list[tuple[str, nn.Parameter]]
Make = Callable[[Named], torch.optim.Optimizer]
BASELINE = "AdamW (torch, fused)"
ALL_BUT_GRAMS: Arguments = dict.fromkeys(("use_orthogonal_grad", "use_adopt_stability", "use_tam", "use_alora"), True)


class Row(NamedTuple):
    """One optimizer's results."""

    name: str
    first_s: float  # the first step, with whatever is compiled or allocated in it
    ms: float
    ratio: tuple[float, float, float]  # quartiles
    bytes_per_parameter: float


def lora_shapes() -> Iterator[tuple[str, int, int, bool]]:
    """(module, inputs, outputs, 1x1 convolution) of the 192 LoRA targets in the attention blocks of SD 1.5's UNet."""
    context = 768
    places = [f"down_blocks.{block}.attentions.{i}" for block in range(3) for i in range(2)]
    places += [
        "mid_block.attentions.0",
        *(f"up_blocks.{block}.attentions.{i}" for block in (1, 2, 3) for i in range(3)),
    ]
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
    for place, width in zip(places, widths, strict=True):
        yield f"{place}.proj_in", width, width, True
        for attention, source in (("attn1", width), ("attn2", context)):
            block = f"{place}.transformer_blocks.0.{attention}"
            yield f"{block}.to_q", width, width, False
            yield f"{block}.to_k", source, width, False
            yield f"{block}.to_v", source, width, False
            yield f"{block}.to_out.0", width, width, False
        yield f"{place}.transformer_blocks.0.ff.net.0.proj", width, 8 * width, False  # GEGLU
        yield f"{place}.transformer_blocks.0.ff.net.2", 4 * width, width, False
        yield f"{place}.proj_out", width, width, True


def lora_parameters(rank: int) -> Named:
    """384 parameters with gradients, lora_up a little away from zero as after some training."""
    generator = torch.Generator().manual_seed(0)

    def parameter(shape: tuple[int, ...], size: float) -> nn.Parameter:
        made = nn.Parameter(torch.randn(shape, generator=generator) * size)
        made.grad = torch.randn(shape, generator=generator) * 1e-3
        return made

    named: Named = []
    for module, inputs, outputs, convolution in lora_shapes():
        tail = (1, 1) if convolution else ()
        name = "lora_unet_" + module.replace(".", "_")
        named.append((f"{name}.lora_down.weight", parameter((rank, inputs, *tail), inputs**-0.5)))
        named.append((f"{name}.lora_up.weight", parameter((outputs, rank, *tail), 1e-3)))
    return named


def ours(**settings: bool | int | str) -> Make:
    from library.optimizers import CustomAdamW

    options: Arguments = {**settings}
    return lambda named: CustomAdamW(named, lr=1e-4, **options)


def others(path: str, **options: bool) -> Make:
    """An optimizer of another package, imported when it is measured."""

    def make(named: Named) -> torch.optim.Optimizer:
        package, name = path.rsplit(".", 1)
        return getattr(import_module(package), name)([parameter for _, parameter in named], lr=1e-4, **options)

    return make


def orthograd(named: Named) -> torch.optim.Optimizer:
    from pytorch_optimizer import OrthoGrad

    return OrthoGrad(others("torch.optim.AdamW", fused=True)(named))


def contenders() -> dict[str, Make]:
    return {
        BASELINE: others("torch.optim.AdamW", fused=True),
        "AdamW (torch, foreach)": others("torch.optim.AdamW", foreach=True),
        "AdamW8bit (bitsandbytes)": others("bitsandbytes.optim.AdamW8bit"),
        "AdamW (bitsandbytes, 32-bit)": others("bitsandbytes.optim.AdamW"),
        "ADOPT (pytorch_optimizer)": others("pytorch_optimizer.ADOPT"),
        "ADOPT + cautious (pytorch_optimizer)": others("pytorch_optimizer.ADOPT", cautious=True),
        "Grams (pytorch_optimizer)": others("pytorch_optimizer.Grams"),
        "AdaTAM (pytorch_optimizer)": others("pytorch_optimizer.AdaTAM"),
        "OrthoGrad(fused AdamW) (pytorch_optimizer)": orthograd,
        "**CustomAdamW, all off, 32-bit** (ours)": ours(optim_bits=32, **everything_off()),
        "**CustomAdamW, all off, 8-bit** (ours)": ours(optim_bits=8, **everything_off()),
        "**CustomAdamW, defaults, 32-bit** (ours)": ours(optim_bits=32),
        "**CustomAdamW, defaults, 8-bit** (ours)": ours(optim_bits=8),
        "**CustomAdamW, all but Grams, 32-bit** (ours)": ours(optim_bits=32, **ALL_BUT_GRAMS),
        "**CustomAdamW, all but Grams, 8-bit** (ours)": ours(optim_bits=8, **ALL_BUT_GRAMS),
        "**CustomAdamW, Muon alone, 32-bit** (ours)": ours(optim_bits=32, **everything_off() | {"orthogonalize": True}),
        "**CustomAdamW, Muon alone, 8-bit** (ours)": ours(optim_bits=8, **everything_off() | {"orthogonalize": True}),
        "CustomAdamW, defaults, 32-bit, compiled": ours(optim_bits=32, implementation="compiled"),
        "CustomAdamW, defaults, 8-bit, compiled": ours(optim_bits=8, implementation="compiled"),
        "CustomAdamW, defaults, 32-bit, plain torch": ours(optim_bits=32, implementation="eager"),
        "CustomAdamW, defaults, 8-bit, plain torch": ours(optim_bits=8, implementation="eager"),
    }


def everything_off() -> dict[str, bool]:
    from library.optimizers.custom_adamw.techniques import TECHNIQUES

    return dict.fromkeys(TECHNIQUES, False)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state: every tensor once, at its own size (a view of a shared buffer counts for its part)."""

    def tensors(value: object) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            for part in value.values():
                yield from tensors(part)

    parts = (part for state in optimizer.state.values() for part in tensors(state))
    seen = {(part.data_ptr(), part.nbytes): part.nbytes for part in parts if part.numel() > 0}
    return sum(seen.values())


def measure(rank: int, chosen: dict[str, Make], rounds: int) -> list[Row]:
    numbers = sum(parameter.numel() for _, parameter in lora_parameters(rank))
    optimizers = {name: make(lora_parameters(rank)) for name, make in chosen.items()}
    first = {name: timed(optimizer.step) for name, optimizer in optimizers.items()}
    for optimizer in optimizers.values():
        optimizer.step()  # ADOPT moves from the second step on
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for count in range(rounds):
        for name in list(optimizers) if count % 2 else reversed(optimizers):
            times[name].append(timed(optimizers[name].step))
    return [
        Row(
            name,
            first[name],
            statistics.median(times[name]) * 1e3,
            quartiles([mine / base for mine, base in zip(times[name], times[BASELINE], strict=True)]),
            state_bytes(optimizer) / numbers,
        )
        for name, optimizer in optimizers.items()
    ]


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def training_step_seconds(resolution: int) -> float:
    """Forward and backward through the true-size UNet (random weights) with a rank-16 LoRA: one image, float32."""
    from diffusers import UNet2DConditionModel

    widths = (320, 640, 1280, 1280)
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, block_out_channels=widths)
    unet.requires_grad_(False)
    adapters = inject(unet, {"Transformer2DModel"}, rank=16, alpha=16)
    assert len(adapters) == len(list(lora_shapes()))
    noisy, context = torch.randn(1, 4, resolution // 8, resolution // 8), torch.randn(1, 77, 768)
    return min(timed(lambda: unet(noisy, 500, context).sample.square().mean().backward()) for _ in range(2))


def table(rows: list[Row], training_step: float | None) -> str:
    """As Markdown, with the share of a training step where that was measured."""
    share = training_step is not None
    lines = [
        "| optimizer | ms | ratio, median (quartiles) | state bytes per parameter | first step, s |"
        + (" share of a training step |" if share else ""),
        "|---|---|---|---|---|" + ("---|" if share else ""),
    ]
    for row in rows:
        low, middle, high = row.ratio
        line = f"| {row.name} | {row.ms:.1f} | {middle:.2f} ({low:.2f}–{high:.2f}) | {row.bytes_per_parameter:.3f} "
        line += f"| {row.first_s:.2f} |"
        if training_step is not None:
            line += f" {row.ms / (row.ms + training_step * 1e3):.2%} |"
        lines.append(line)
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=40, help="steps of each optimizer that are measured")
    parser.add_argument("--only", default="", help="comma-separated parts of names; the baseline is always there")
    parser.add_argument("--quick", action="store_true", help="rank 16, 20 rounds, the baseline and ours")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--training_step", type=int, metavar="PIXELS", help="measure a training step of this size too")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    logging.getLogger("library").setLevel(logging.ERROR)
    ranks, rounds, words = options.ranks, options.rounds, [w for w in options.only.lower().split(",") if w]
    if options.quick:
        ranks, rounds, words = [16], 20, ["(ours)"]
    chosen = {
        name: make
        for name, make in contenders().items()
        if name == BASELINE or not words or any(word in name.lower() for word in words)
    }
    print(f"torch {torch.__version__}, {options.threads} threads, {rounds} rounds")
    whole = None
    if options.training_step:
        whole = training_step_seconds(options.training_step)
        print(
            f"A training step at {options.training_step} px, one image, float32, without the optimizer: {whole:.2f} s"
        )
    for rank in ranks:
        print(f"\n### Rank {rank}\n\n{table(measure(rank, chosen, rounds), whole)}", flush=True)


if __name__ == "__main__":
    # fresh 27 MB temporaries fault page by page on virtual machines: let the allocator keep its memory. The setting
    # counts from the start of a process only
    if os.environ.get("MALLOC_MMAP_MAX_") != "0" and sys.platform == "linux":
        kept = {**os.environ, "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.optimizer_step", *sys.argv[1:]], kept)
    main()
