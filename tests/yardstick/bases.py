"""Base models beside the quickstart's: the tests' tiny Stable Diffusion 2 and XL, and the quickstart's otherwise."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "quickstart" / "base"


def write(name: str, folder: str) -> None:
    """Write the base of that name; the same bytes on every machine and with every version of torch."""
    target = Path(folder)
    if name == "sd2":
        from tests import tiny_sd2

        refill(tiny_sd2.write(target))
        shutil.copytree(QUICKSTART / "tokenizer", target / "tokenizer")
    elif name == "sdxl":
        from tests import tiny_sdxl

        refill(tiny_sdxl.write(target))
    elif name == "v":  # the quickstart's base, said to predict velocity
        shutil.copytree(QUICKSTART, target)
        schedule = target / "scheduler" / "scheduler_config.json"
        config = json.loads(schedule.read_text(encoding="utf-8")) | {"prediction_type": "v_prediction"}
        schedule.write_text(json.dumps(config), encoding="utf-8")
    elif name == "vae":  # the quickstart's, in one file with the original names
        from safetensors.torch import load_file, save_file

        from tests.models.original_layout import vae_name

        config = json.loads((QUICKSTART / "vae" / "config.json").read_text(encoding="utf-8"))
        states = load_file(QUICKSTART / "vae" / "diffusion_pytorch_model.safetensors")
        blocks = len(config["block_out_channels"])
        target.mkdir(parents=True)
        save_file({vae_name(key, blocks=blocks): value for key, value in states.items()}, target / "vae.safetensors")
    else:
        raise ValueError(name)


def refill(folder: Path) -> None:
    """Replace all weights by numbers that depend on their names and shapes alone: initialisers draw by the processor,
    and change with versions. Uniform numbers are products of whole ones, so they have the same bits everywhere."""
    from safetensors.numpy import load_file, save_file

    for file in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(file)
        save_file({key: _numbers(key, old) for key, old in tensors.items()}, file, metadata={"format": "pt"})


def _numbers(name: str, old: np.ndarray) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    uniform = 2 * np.random.default_rng(seed).random(old.shape) - 1
    if old.ndim == 1:  # biases and norms
        values = 0.1 * uniform + (1 if name.endswith("weight") else 0)
    else:
        std = 0.3 if "embedding." in name and "time" not in name and "add" not in name else _fan_in(old) ** -0.5
        values = 3**0.5 * std * uniform
    return values.astype(old.dtype)


def _fan_in(tensor: np.ndarray) -> int:
    return tensor[0].size
