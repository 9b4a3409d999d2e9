"""Each kind of adapter at the true SD 1.5 size: time of forward and backward, and peak memory.

    python -m benchmarks.adapters [--rounds 7] [--only loha --only lokr] [--folder output/sd15]

The UNet in bf16 with autocast, batch 1, 256 px, random weights; adapters in fp32 on the layers of LyCORIS' preset
attn-mlp. A round runs LoRA of the same rank, the kind, and LyCORIS' own of it, one after another on the same UNet, so
whatever else the machine does falls on all. Peak memory: each in a process of its own, over what the UNet alone takes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import quartiles, sd15_folder

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).parent.parent
Attach = Callable[[], "tuple[nn.Module, Callable[[], None]]"]  # the network, attached, and how it is taken off


@dataclass(frozen=True)
class Case:
    """A kind with its arguments. lycoris: the same in LyCORIS' words; None: it does not have it. dim: the rank."""

    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    lycoris: dict[str, Any] | None = None
    dim: int | None = 16
    alpha: float | None = 8


CASES = {
    "lora": Case("lora", {}, {"algo": "lora"}),
    "dora": Case("dora", {}, {"algo": "lora", "dora_wd": True, "wd_on_output": False}),
    "dora, rows": Case("dora", {"wd_on_output": True}, {"algo": "lora", "dora_wd": True}),
    "loha, rank 4": Case("loha", {}, {"algo": "loha"}, dim=4, alpha=2),
    "loha, rank 16": Case("loha", {}, {"algo": "loha"}),
    "lokr, factor 8": Case("lokr", {"factor": 8}, {"algo": "lokr", "factor": 8}),
    "lokr, full": Case("lokr", {"factor": 8, "full_matrix": True}, {"algo": "lokr", "factor": 8, "full_matrix": True}),
    "glora": Case("glora", {}, {"algo": "glora"}),
    "oft": Case("oft", {"dim_is_size": True}, {"algo": "diag-oft", "constraint": 0}, alpha=None),
    "boft": Case("boft", {}, {"algo": "boft", "constraint": 0}, dim=10, alpha=None),
    "ia3": Case("ia3", {}, {"algo": "ia3"}, dim=None, alpha=None),
    "full": Case("full", {}, {"algo": "full"}, dim=None, alpha=None),
    "dylora": Case("dylora", {}, {"algo": "dylora", "block_size": 1}),
    "lora_fa": Case("lora_fa"),
    "adalora": Case("adalora"),
    "pissa": Case("pissa"),
    "vera": Case("vera", dim=256, alpha=None),
}


def unet_of(folder: Path) -> nn.Module:
    """The UNet, frozen, in bf16."""
    import torch
    from diffusers import UNet2DConditionModel

    unet: nn.Module = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.bfloat16)
    return unet.requires_grad_(False).train()


def ours(unet: nn.Module, case: Case) -> Attach:
    """Our network of this kind."""
    from library.models.blocks import SD
    from library.models.family import AdapterTargets
    from library.models.latent_diffusion import UNET_CONV, UNET_LINEAR
    from networks.create import create
    from networks.settings import Asked

    where = AdapterTargets("unet", "lora_unet", unet, UNET_LINEAR, UNET_CONV, lambda path: path, blocks=SD)
    network = create(
        case.kind, [where], Asked(dim=case.dim, alpha=case.alpha, seed=1), {"preset": "attn-mlp", **case.arguments}
    )
    network.attach(["unet"])
    network.detach()
    network.train()

    def attach() -> tuple[nn.Module, Callable[[], None]]:
        for adapter in network.adapters:
            adapter.attach()
        network.before_batch()
        return network, network.detach

    return attach


def lycoris(unet: nn.Module, case: Case) -> Attach:
    """LyCORIS' network of the same kind on the same layers."""
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel"], "target_name": []})
    words = {"linear_dim": case.dim or 16, "linear_alpha": case.alpha or 0, **(case.lycoris or {})}
    network = create_lycoris(unet, 1.0, **words)
    network.train()

    def attach() -> tuple[nn.Module, Callable[[], None]]:
        network.apply_to()
        return network, network.restore

    return attach


def step(unet: Any, attach: Attach, *, resolution: int) -> float:
    """Seconds of one forward and backward."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = resolution // 8
    latents = torch.randn(1, 4, size, size, generator=generator)
    text = torch.randn(1, 77, 768, generator=generator)
    network, take_off = attach()
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        answer = unet(latents, torch.tensor([500]), text).sample
    answer.float().square().mean().backward()
    taken = time.perf_counter() - start
    for parameter in network.parameters():
        parameter.grad = None
    take_off()
    return taken


def timed(unet: nn.Module, case: Case, options: argparse.Namespace) -> tuple[list[list[float]], int]:
    """Seconds of each round: LoRA's, the kind's, and LyCORIS' where it has it; and the kind's trained numbers."""
    runs = [ours(unet, Case("lora", dim=case.dim if case.dim in range(1, 65) else 16)), ours(unet, case)]
    network, take_off = runs[1]()
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    take_off()
    if case.lycoris is not None:
        runs.append(lycoris(unet, case))
    for attach in runs:
        step(unet, attach, resolution=options.resolution)
    rounds = []
    for turn in range(options.rounds):
        order = list(range(len(runs)))
        order = order[turn % len(order) :] + order[: turn % len(order)]
        taken = {which: step(unet, runs[which], resolution=options.resolution) for which in order}
        rounds.append([taken[which] for which in range(len(runs))])
    return rounds, trained


def peak(name: str, whose: str, options: argparse.Namespace) -> float:
    """MiB over the UNet's own, in a process of its own."""
    words = ["-m", "benchmarks.adapters", "--peak", name, whose, "--folder", str(options.folder)]
    words += ["--resolution", str(options.resolution)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["mib"])


def print_peak(name: str, whose: str, options: argparse.Namespace) -> None:
    """The child of `peak`: two steps, and how far memory rose above what the loaded UNet takes. Linux only."""

    def mib(name: str) -> float:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**10

    unet = unet_of(options.folder)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak of loading is no part of it
    before = mib("VmRSS")
    attach = (lycoris if whose == "lycoris" else ours)(unet, CASES[name])
    for _ in range(2):
        step(unet, attach, resolution=options.resolution)
    print(json.dumps({"mib": mib("VmHWM") - before}))


def ratio(rounds: list[list[float]], ours_at: int, peer_at: int) -> str:
    low, middle, high = quartiles([taken[ours_at] / taken[peer_at] for taken in rounds])
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("output/sd15"))
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--no-memory", action="store_true", help="leave the processes for peak memory out")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        name, whose = options.peak
        print_peak(name, whose, options)
        return
    sd15_folder(options.folder)
    unet = unet_of(options.folder)
    print("| | trained | ours, s | to LoRA of the same rank | to LyCORIS | peak, MiB | LyCORIS' peak, MiB |")
    print("|---|---|---|---|---|---|---|")
    for name in options.only or CASES:
        case = CASES[name]
        rounds, trained = timed(unet, case, options)
        peer = ratio(rounds, 1, 2) if case.lycoris is not None else "–"
        memory = ["", ""]
        if not options.no_memory:
            memory[0] = f"{peak(name, 'ours', options):.0f}"
            memory[1] = f"{peak(name, 'lycoris', options):.0f}" if case.lycoris is not None else "–"
        seconds = statistics.median(taken[1] for taken in rounds)
        print(
            f"| {name} | {trained:,} | {seconds:.2f} | {ratio(rounds, 1, 0)} | {peer} | {' | '.join(memory)} |",
            flush=True,
        )
        gc.collect()


if __name__ == "__main__":
    main()
