"""The tools on files of true size, against kohya's scripts, LyCORIS' functions, and a plain copy of the file.

    python -m benchmarks.tools FOLDER --kohya ~/sd-scripts               # all parts, every layer: hours of SVDs
    python -m benchmarks.tools FOLDER --kohya ~/sd-scripts --every 19    # every 19th layer of the LoRAs: minutes
    python -m benchmarks.tools FOLDER --only checkpoint --family sdxl    # needs 14 GB in FOLDER

FOLDER takes the files, which are made once: LoRAs of SDXL's layers with random factors whose singular values fall as
k^-0.75, and checkpoints of random weights in fp16. Each program runs as a process of its own, one after the other, so
that its time has its imports in it and its peak is that of the process. Errors are relative to the exact result, in the
Frobenius norm over all layers. `--kohya_packages`: a folder with the packages that kohya's scripts need and this
environment lacks. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.units import human_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from networks.tools.low_rank import Factors

ROOT = Path(__file__).resolve().parents[1]
DECAY = 0.75
SEED = 0


@dataclass(frozen=True)
class Run:
    """A finished process: wall and CPU time in seconds, and the largest resident memory in bytes."""

    name: str
    seconds: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Bench:
    """Where the files are, and the peers."""

    folder: Path
    kohya: Path | None
    packages: str
    threads: int
    every: int
    lycoris: bool

    def run(self, name: str, *words: object, own: bool = True) -> Run:
        """A program from its start to its end. `own`: of this project; else one of kohya's. Ends if it fails."""
        path = str(ROOT) if own else os.pathsep.join(filter(None, (self.packages, str(self.kohya))))
        threads = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        log = self.folder / "last.log"
        with log.open("wb") as file:
            start = time.perf_counter()
            process = subprocess.Popen(
                [str(word) for word in words], stdout=file, stderr=file, env=os.environ | threads | {"PYTHONPATH": path}
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"{name}: failed\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
        return Run(name, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)

    def tool(self, name: str, *words: object) -> Run:
        """One of ours."""
        return self.run(name, sys.executable, "-m", "networks.tools", *words, "--overwrite")

    def script(self, name: str, *words: object) -> Run:
        """One of kohya's."""
        assert self.kohya is not None
        return self.run(f"kohya, {name}", sys.executable, self.kohya / "networks" / name, *words, own=False)

    def source(self, rank: int, seed: int) -> Path:
        """A LoRA of SDXL."""
        path = self.folder / f"sdxl-rank{rank}-seed{seed}-every{self.every}.safetensors"
        if not path.exists():
            write_lora(path, layer_shapes(self.folder, "sdxl")[:: self.every], rank, seed, "sdxl_base_v1-0")
        return path


def main() -> None:
    """Measure, and print."""
    options = read_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.lycoris_resize is not None:
        source, target, rank = options.lycoris_resize
        lycoris_resize(Path(source), Path(target), int(rank))
        return
    bench = Bench(
        options.folder.resolve(), options.kohya, options.kohya_packages, options.threads, options.every, options.lycoris
    )
    if bench.kohya is None:
        print("kohya's scripts are absent (--kohya FOLDER): only ours is measured\n")
    elif not (bench.kohya / "networks" / "resize_lora.py").is_file():
        raise SystemExit(f"--kohya {bench.kohya}: has no networks/resize_lora.py")
    print(f"{options.threads} threads; load {os.getloadavg()[0]:.1f}; every {options.every}. layer of SDXL's LoRAs\n")
    parts = {"resize": resizing, "merge": merging}
    for name in options.only:
        if name in parts:
            parts[name](bench)
        else:
            into_checkpoint(bench, options.family, options.rounds)


def read_options() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kohya", type=Path, help="a checkout of kohya's sd-scripts")
    parser.add_argument("--kohya_packages", default="", help="a folder for PYTHONPATH of its scripts")
    parser.add_argument("--lycoris", action="store_true", help="LyCORIS as well, whose full SVDs take the longest")
    parser.add_argument("--only", nargs="+", choices=("resize", "merge", "checkpoint"))
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15", help="of the checkpoint")
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        help="take every n-th layer of the LoRAs; no multiple of 2 or 5: ten layers repeat",
    )
    parser.add_argument("--rounds", type=int, default=3, help="copies and merges, in turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lycoris_resize", nargs=3, help=argparse.SUPPRESS)  # SOURCE TARGET RANK, in a process
    options = parser.parse_args()
    options.only = options.only or ["resize", "merge", "checkpoint"]
    return options


# -- LoRA files


def resizing(bench: Bench) -> None:
    """Rank 128 to 32."""
    source, target = bench.source(128, SEED), bench.folder / "resized.safetensors"
    exact = factors_in(source)
    best = math.sqrt(sum(lost(one, 32) for one in exact.values()) / sum(one.norm() ** 2 for one in exact.values()))
    print(f"### rank 128 to 32: {len(exact)} layers, {human_bytes(source.stat().st_size)}; best error {best:.6f}\n")
    print_table(resizers(bench, source, target), target, exact)


def resizers(bench: Bench, source: Path, target: Path) -> Iterator[Run]:
    """Each program's run, which has written `target`."""
    yield bench.tool("resize", "resize", source, "--rank", 32, "--save_precision", "float", "--save_to", target)
    if bench.kohya is not None:
        words = ("--model", source, "--new_rank", 32, "--save_precision", "float", "--save_to", target)
        yield bench.script("resize_lora.py", *words)
    if bench.lycoris:
        own = (sys.executable, "-m", "benchmarks.tools", bench.folder)
        yield bench.run("LyCORIS, extract_linear", *own, "--lycoris_resize", source, target, 32)


def merging(bench: Bench) -> None:
    """0.7 and 0.3 of two of rank 64."""
    sources, target = [bench.source(64, seed) for seed in (SEED, SEED + 1)], bench.folder / "merged.safetensors"
    parts = [factors_in(source) for source in sources]
    exact = {name: added(one.times(0.7), parts[1][name].times(0.3)) for name, one in parts[0].items()}
    whole = sum(one.norm() ** 2 for one in exact.values())
    best = math.sqrt(sum(lost(one, 64) for one in exact.values()) / whole)
    print(f"### two of rank 64: {len(exact)} layers each; best error of rank 64 {best:.6f}\n")
    print_table(mergers(bench, sources, target), target, exact)


def mergers(bench: Bench, sources: Sequence[Path], target: Path) -> Iterator[Run]:
    """Each program's run, which has written `target`."""
    ours = ("merge", *sources, "--weights", 0.7, 0.3, "--save_precision", "float", "--save_to", target)
    yield bench.tool("merge --rank 64", *ours, "--rank", 64)
    yield bench.tool("merge, exact at rank 128", *ours)
    if bench.kohya is None:
        return
    words = ("--models", *sources, "--ratios", 0.7, 0.3, "--save_precision", "float", "--save_to", target)
    yield bench.script("svd_merge_lora.py", *words, "--new_rank", 64)
    yield bench.script("sdxl_merge_lora.py", *words)


def layer_shapes(folder: Path, family: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names in files and shapes of the layers that a LoRA sits on."""
    from benchmarks import true_outlines
    from library.models.opening import open_family
    from networks.sites import find_sites

    opened = open_family(str(true_outlines.write(folder / f"outline-{family}", family)))
    with opened.outlined():
        sites = find_sites(opened.adapter_targets(), conv=False)
        return [(site.name, tuple(site.module.weight.shape)) for site in sites]


def write_lora(path: Path, layers: Sequence[tuple[str, tuple[int, ...]]], rank: int, seed: int, version: str) -> None:
    """A LoRA in fp16 whose differences have singular values that fall about as k^-DECAY."""
    import torch
    from safetensors.torch import save_file

    from networks.lora import pair_shapes

    torch.manual_seed(seed)
    falling = torch.arange(1, rank + 1) ** -DECAY
    tensors = {}
    for name, shape in layers:
        shapes = pair_shapes(shape, rank)
        down = torch.randn(rank, math.prod(shape[1:])) / math.sqrt(math.prod(shape[1:]))
        up = torch.randn(shape[0], rank) / math.sqrt(shape[0]) * falling
        tensors[f"{name}.lora_down.weight"] = down.view(tuple(shapes["lora_down.weight"])).half()
        tensors[f"{name}.lora_up.weight"] = up.view(tuple(shapes["lora_up.weight"])).half()
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    metadata = {"ss_base_model_version": version, "ss_v2": "False", "ss_network_module": "networks.lora"}
    save_file(tensors, path, {**metadata, "ss_network_dim": str(rank), "ss_network_alpha": str(rank)})


def factors_in(path: Path) -> dict[str, Factors]:
    """By layer."""
    from safetensors.torch import load_file

    from networks.tools.low_rank import factors_of

    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        name, _, end = key.partition(".")
        layers.setdefault(name, {})[end] = tensor
    return {name: factors_of(own) for name, own in layers.items()}


def added(first: Factors, second: Factors) -> Factors:
    """The exact sum."""
    from networks.tools.low_rank import stacked

    return stacked([first, second], "sum")


def lost(factors: Factors, rank: int) -> float:
    """The squared singular values beyond the rank: the squared error of the best result, in fp64."""
    import torch

    left, right = torch.linalg.qr(factors.up.double()).R, torch.linalg.qr(factors.down.double().T).R
    return float(torch.linalg.svdvals(left @ right.T)[rank:].square().sum())


def distance(found: Mapping[str, Factors], exact: Mapping[str, Factors]) -> float:
    """|found - exact| / |exact| over all layers."""
    assert found.keys() == exact.keys(), "the programs write the same layers"
    square = sum(added(found[name], one.times(-1)).norm() ** 2 for name, one in exact.items())
    return math.sqrt(square / sum(one.norm() ** 2 for one in exact.values()))


def lycoris_resize(source: Path, target: Path, rank: int) -> None:
    """What LyCORIS has for it: the extraction of each dense difference."""
    from lycoris.utils import extract_linear
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, factors in factors_in(source).items():
        (down, up, _), _ = extract_linear(factors.dense(), "fixed", rank)
        tensors |= {f"{name}.lora_down.weight": down.contiguous(), f"{name}.lora_up.weight": up.contiguous()}
    save_file(tensors, target)


def print_table(runs: Iterable[Run], target: Path, exact: Mapping[str, Factors]) -> None:
    """A row for each, as soon as it has ended. CPU times as multiples of the first's: other programs on the machine
    lengthen them less than wall time."""
    print("| program | seconds | of CPU | × ours | error | peak |\n|---|---|---|---|---|---|", flush=True)
    first = None
    for run in runs:
        first = first or run
        error, times, peak = distance(factors_in(target), exact), run.cpu / first.cpu, human_bytes(run.peak)
        target.unlink()
        print(f"| {run.name} | {run.seconds:.1f} | {run.cpu:.1f} | {times:.1f} | {error:.6f} | {peak} |", flush=True)
    print()


# -- checkpoints


def into_checkpoint(bench: Bench, family: str, rounds: int) -> None:
    """A LoRA of rank 64 into a checkpoint, and a copy of that."""
    base, target = bench.folder / f"{family}.safetensors", bench.folder / "target.safetensors"
    version = "sdxl_base_v1-0" if family == "sdxl" else "sd_v1"
    lora = bench.folder / f"{family}-rank64.safetensors"
    if not lora.exists():
        write_lora(lora, layer_shapes(bench.folder, family), 64, SEED, version)
    if not base.exists():
        write_checkpoint(base, family)
    size = base.stat().st_size
    print(f"### into a checkpoint of {human_bytes(size)} ({family}, fp16, in the page cache)\n")
    print("| | seconds | of CPU | MB/s | of the copy's speed | peak |\n|---|---|---|---|---|---|")
    for _ in range(rounds):
        copy = bench.run("copy", "sh", "-c", 'cp --reflink=never "$0" "$1" && sync "$1"', base, target)
        target.unlink()
        merged = bench.tool("merge --base", "merge", lora, "--base", base, "--save_to", target)
        target.unlink()
        for run in (copy, merged):
            share = copy.seconds / run.seconds
            speed, peak = size / run.seconds / 1e6, human_bytes(run.peak)
            print(f"| {run.name} | {run.seconds:.1f} | {run.cpu:.1f} | {speed:.0f} | {share:.2f} | {peak} |")
    print()


def write_checkpoint(path: Path, family: str, *, empty: bool = False) -> None:
    """Random weights in fp16 in one file; the UNet and the text encoders under their original names. `empty`: a sparse
    file of that length instead."""
    import torch

    shapes = checkpoint_shapes(family)
    header, end = {}, 0
    for name, shape in shapes.items():
        offsets = [end, end := end + 2 * math.prod(shape)]
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    torch.manual_seed(SEED)
    block = (torch.randn(1 << 24) * 0.02).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if empty:
            file.truncate(8 + len(text) + end)
            return
        while end:
            end -= file.write(block[: min(end, len(block))])


def checkpoint_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Of a whole checkpoint. The VAE, which merging only copies, has diffusers' names."""
    from library.models import modules
    from library.models.checkpoints.base_model import ASSETS
    from library.models.checkpoints.checkpoint import original_unet_name

    config = json.loads((ASSETS / ("sdxl.json" if family == "sdxl" else "sd1.json")).read_text(encoding="utf-8"))
    found: dict[str, tuple[int, ...]] = {}
    for name, parameter in modules.new_unet(config["unet"]).named_parameters():
        path, _, leaf = name.rpartition(".")
        original = f"{original_unet_name(path, layers_per_block=2)}.{leaf}"
        found[f"model.diffusion_model.{original}"] = tuple(parameter.shape)
    for name, parameter in modules.new_vae(config["vae"]).named_parameters():
        found[f"first_stage_model.{name}"] = tuple(parameter.shape)
    clip = "conditioner.embedders.0" if family == "sdxl" else "cond_stage_model"
    for name, parameter in modules.new_text_encoder(config["text_encoder"]).named_parameters():
        found[f"{clip}.transformer.text_model.{name.removeprefix('text_model.')}"] = tuple(parameter.shape)
    if family == "sdxl":
        found |= open_clip_shapes(modules.new_projected_text_encoder(config["text_encoder_2"]).named_parameters())
    return found


def open_clip_shapes(parameters: Iterator[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    """SDXL's second text encoder, in whose file query, key and value are one tensor."""
    layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    layer |= {"self_attn.out_proj": "attn.out_proj", "self_attn.q_proj": "attn.in_proj"}
    rest = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
        "text_projection.weight": "text_projection",
    }
    found = {}
    for full, parameter in parameters:
        name, shape = full.removeprefix("text_model."), tuple(parameter.shape)
        if name.startswith("encoder.layers."):
            number, path = name.removeprefix("encoder.layers.").split(".", 1)
            path, _, leaf = path.rpartition(".")
            if path in ("self_attn.k_proj", "self_attn.v_proj"):
                continue
            if path == "self_attn.q_proj":
                shape, leaf = (3 * shape[0], *shape[1:]), f"in_proj_{leaf}"
            name = f"transformer.resblocks.{number}.{layer[path].removesuffix('.in_proj')}.{leaf}"
        else:
            name = rest[name]
        found[f"conditioner.embedders.1.model.{name}"] = shape
    return found


if __name__ == "__main__":
    main()
