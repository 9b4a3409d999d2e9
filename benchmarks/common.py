"""What the benchmarks share: interleaved timing against a peer, quartiles, and a model of true size."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of ours and of the peer, taken in turns, and the ratio within each pair."""

    ours: list[float]
    peer: list[float]

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.peer, strict=True)]


def interleaved(ours: Callable[[], object], peer: Callable[[], object], *, pairs: int, warmup: int = 2) -> Comparison:
    """Time both in turns, so that whatever else the machine does falls on both; the order changes with every pair."""
    for _ in range(warmup):
        ours()
        peer()
    times: dict[int, list[float]] = {0: [], 1: []}
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (ours, peer)[which]()
            times[which].append(time.perf_counter() - start)
    return Comparison(times[0], times[1])


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def row(name: str, comparison: Comparison, *, unit: float = 1.0, digits: int = 3) -> str:
    """A row of the Markdown table that `header` begins: medians, and the ratio with its quartiles."""
    ours, peer = (statistics.median(v) * unit for v in (comparison.ours, comparison.peer))
    low, middle, high = quartiles(comparison.ratios)
    return f"| {name} | {ours:.{digits}f} | {peer:.{digits}f} | {middle:.3f} ({low:.3f}–{high:.3f}) |"


def header(ours: str, peer: str) -> str:
    return f"| | {ours} | {peer} | ratio, median (quartiles) |\n|---|---|---|---|"


def sd15_folder(folder: Path) -> Path:
    """A diffusers folder with the true SD 1.5 architecture and random weights (fp32, 4.3 GB), made once."""
    if (folder / "model_index.json").exists():
        return folder
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from library.models.checkpoints.base_model import ASSETS

    config = json.loads((ASSETS / "sd1.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(config["vae"]),
        text_encoder=CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
        tokenizer=CLIPTokenizer.from_pretrained(ASSETS / "clip_tokenizer"),
        unet=UNet2DConditionModel.from_config(config["unet"]),
        scheduler=PNDMScheduler.from_config({**config["scheduler"], "skip_prk_steps": True}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
