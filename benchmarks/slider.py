"""How far a slider moves pictures along its axis: the mean of red minus blue, by multiplier, for the quickstart's.

    python train_leco.py --config_file configs/quickstart_slider.toml
    python -m benchmarks.slider output/quickstart-slider.safetensors

Renders 16 pictures of the target prompt at each multiplier, from the same noises.
"""

from __future__ import annotations

import csv
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from library.evaluation import draw

PROMPT = "emoji of heart, smileys and emotion --w 64 --h 64 --s 25 --l 4"
MULTIPLIERS = (-2, -1, 0, 1, 2)
SEEDS = range(16)


def redness(path: Path) -> float:
    """The mean of red minus blue over all pixels, of 255."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float64)
    return float((pixels[..., 0] - pixels[..., 2]).mean())


def rendered(lora: str, folder: Path) -> Iterator[list[Path]]:
    """The pictures at each multiplier."""
    words = [lora, "--prompt", PROMPT, "--multipliers", *map(str, MULTIPLIERS), "--seeds", *map(str, SEEDS)]
    words += ["--no-base_column", "--pretrained_model_name_or_path", "quickstart/base", "--output_dir", str(folder)]
    assert draw.main([*words, "--singles"]) == 0
    with (folder / "grid.csv").open(encoding="utf-8", newline="") as file:
        files = [Path(row["file"]) for row in csv.DictReader(file)]
    for start in range(0, len(files), len(SEEDS)):
        yield files[start : start + len(SEEDS)]


def main(lora: str) -> None:
    """Print a line for each multiplier."""
    with tempfile.TemporaryDirectory() as folder:
        for multiplier, files in zip(MULTIPLIERS, rendered(lora, Path(folder)), strict=True):
            found = [redness(file) for file in files]
            error = statistics.stdev(found) / len(found) ** 0.5
            print(f"{multiplier:+d}: red - blue {statistics.mean(found):+6.1f} ± {2 * error:.1f}")


if __name__ == "__main__":
    main(sys.argv[1])
