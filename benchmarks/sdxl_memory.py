"""Memory of SDXL at its true size: estimates for GPUs, and peak memory and time of real steps on this machine.

    python -m benchmarks.sdxl_memory estimate          # two minutes; shapes only, no weights
    python -m benchmarks.sdxl_memory measure           # needs about 8 GiB of free memory

What is measured has random weights in bf16, drawn in place at the first call (6.9 GB on disk, --folder).
Estimates are those of `--dry_run --gpu_memory`, without the device's own overhead (CUDA: about 0.5 GiB).
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peak_memory import ROOT
from benchmarks.step_time import image_folder
from benchmarks.true_outlines import write

if TYPE_CHECKING:
    from torch import nn

CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs")
CHECKPOINTED = ("--gradient_checkpointing",)
FLOAT8 = ("--fp8_base",)
# name, resolution, batch, rank, more words
SETTINGS = {
    "UNet only, cached text, checkpointing, 512 px": (512, 1, 16, (*CACHED, *CHECKPOINTED)),
    "UNet only, cached text, checkpointing": (1024, 1, 16, (*CACHED, *CHECKPOINTED)),
    "the same, batch 4": (1024, 4, 16, (*CACHED, *CHECKPOINTED)),
    "the same, batch 12": (1024, 12, 16, (*CACHED, *CHECKPOINTED)),
    "the same, rank 128": (1024, 1, 128, (*CACHED, *CHECKPOINTED)),
    "UNet and text encoders, checkpointing": (1024, 1, 16, CHECKPOINTED),
    "8 bits, UNet only, cached text, checkpointing": (1024, 1, 16, (*FLOAT8, *CACHED, *CHECKPOINTED)),
    "8 bits, UNet and text encoders, checkpointing": (1024, 1, 16, (*FLOAT8, *CHECKPOINTED)),
    "8 bits, UNet only, cached text, no checkpointing": (1024, 1, 16, (*FLOAT8, *CACHED)),
    "UNet only, cached text, no checkpointing": (1024, 1, 16, CACHED),
    "UNet only, cached text, no checkpointing, 768 px": (768, 1, 16, CACHED),
    "UNet and text encoders, no checkpointing": (1024, 1, 16, ()),
}
# Runs in a process of its own: the whole job, then its costs.
WATCHED = """
import json, resource, sys, time
from library.training import loop
step, seconds = loop.optimizer_step, []
def watched(run, item):
    start = time.perf_counter()
    loss = step(run, item)
    seconds.append(time.perf_counter() - start)
    return loss
loop.optimizer_step = watched
from train_network import main
import library.run.build, library.models.modules
library.models.modules.new_unet({"block_out_channels": [32], "down_block_types": ["DownBlock2D"],
                                 "up_block_types": ["UpBlock2D"], "mid_block_type": None})
imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
start = time.perf_counter()
assert main(sys.argv[1:]) == 0
whole = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": seconds, "whole": whole, "peak_gib": peak, "imports_gib": imports}))
"""


def model_folder(folder: Path) -> Path:
    """A diffusers folder of the true SDXL with random weights in bf16, made once."""
    if (folder / "scheduler").exists():
        return folder
    from library.models.checkpoints.base_model import ASSETS
    from library.models.modules import new_projected_text_encoder, new_text_encoder, new_unet, new_vae

    config = json.loads((ASSETS / "sdxl.json").read_text(encoding="utf-8"))
    build = {"unet": new_unet, "vae": new_vae, "text_encoder": new_text_encoder}
    for part, new in {**build, "text_encoder_2": new_projected_text_encoder}.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config[part]), encoding="utf-8")
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        _write_random(folder / part / f"{stem}.safetensors", dict(new(config[part]).named_parameters()))
    (folder / "scheduler").mkdir()
    text = json.dumps({**config["scheduler"], "prediction_type": "epsilon"})
    (folder / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")
    return folder


def _write_random(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """A .safetensors of weights in bf16, one tensor in memory at a time: norms 1, biases 0, the rest small."""
    import torch

    header, end = {}, 0
    for name, parameter in parameters.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [end, end + 2 * parameter.numel()],
        }
        end += 2 * parameter.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, parameter in parameters.items():
            weight = torch.zeros(parameter.shape, dtype=torch.bfloat16)
            if parameter.ndim > 1:
                weight.normal_(std=0.02, generator=generator)
            elif name.endswith("weight"):
                weight.fill_(1)
            file.write(weight.view(torch.int16).numpy().tobytes())


def words(model: Path, data: Path, *, resolution: int, batch: int, rank: int, more: tuple[str, ...]) -> list[str]:
    """The command line of one row: bf16, AdamW in 8 bits, cached latents."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--caption_extension", ".txt"),
        *("--output_dir", str(data / "out"), "--network_dim", str(rank), "--network_alpha", "1"),
        *("--resolution", str(resolution), "--train_batch_size", str(batch), "--optimizer_type", "AdamW8bit"),
        *("--mixed_precision", "bf16", "--cache_latents", "--learning_rate", "1e-4", "--seed", "42"),
        *("--max_train_steps", "3", "--no-loss_plot", "--max_data_loader_n_workers", "0", *more),
    ]


def estimates(model: Path, data: Path, only: list[str] | None) -> None:
    """A table of the estimates of `--dry_run`."""
    print(
        "| setting | px | batch | rank | in a step, GiB | weights | state | activations, gradients | encoding images |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (resolution, batch, rank, more) in SETTINGS.items():
        if only is not None and name not in only:
            continue
        numbers = computed(words(model, data, resolution=resolution, batch=batch, rank=rank, more=more))
        print(
            f"| {name} | {resolution} | {batch} | {rank} | " + " | ".join(f"{n:.2f}" for n in numbers) + " |",
            flush=True,
        )


def computed(command: list[str]) -> list[float]:
    """In GiB, on a GPU: a step, of that weights, state, activations and gradients; and encoding the images before."""
    from library import log
    from library.config.parser import parse
    from library.guidance import verdict
    from library.guidance.moments import TRAINING
    from library.run.plan import make_plan

    with log.errors_only():
        plan = make_plan(parse([*command, "--gpu_memory", "24GB"]))
        needs = verdict.estimator(plan).needs(plan.options)
    step = needs.moment(TRAINING)
    parts = (("weights", "adapter"), ("optimizer state",), ("activations", "gradients"))
    found = [step.total, *(sum(step.parts[name] for name in names) for names in parts)]
    return [nbytes / 2**30 for nbytes in (*found, needs.moment("caching latents").total)]


def measure(model: Path, data: Path, resolution: int, more: tuple[str, ...]) -> None:
    """Peak and seconds of three steps of the first setting, in a process of its own, and the estimate for it."""
    command = words(model, data, resolution=resolution, batch=1, rank=8, more=(*CACHED, *CHECKPOINTED, *more))
    print(f"{resolution} px, computed: {computed(command)[0]:.2f} GiB in a step, beside the program itself", flush=True)
    print(f"{resolution} px, measured: {watched(command)}")


def watched(command: list[str]) -> str:
    """The costs of this training in a process of its own, in words."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    numbers = json.loads(done.stdout.splitlines()[-1])
    seconds = ", ".join(f"{value:.1f}" for value in numbers["seconds"])
    peak = f"{numbers['peak_gib']:.2f} GiB at most, {numbers['imports_gib']:.2f} of them after the imports"
    return f"{peak}; steps {seconds} s; the whole job {numbers['whole']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("estimate", "measure"))
    parser.add_argument("--folder", type=Path, default=Path("output/sdxl"))
    parser.add_argument("--resolution", type=int, default=256, help="of the measured steps")
    parser.add_argument("--only", choices=SETTINGS, action="append", help="of the estimates")
    parser.add_argument("--fp8_base", action="store_true", help="of the measured steps: weights in 8 bits")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = image_folder(Path(temporary, "images"), count=16)  # a batch cannot be larger
        if options.what == "estimate":
            estimates(write(Path(temporary, "sdxl"), "sdxl"), data, options.only)
        else:
            measure(model_folder(options.folder.resolve()), data, options.resolution, FLOAT8 * options.fp8_base)


if __name__ == "__main__":
    main()
