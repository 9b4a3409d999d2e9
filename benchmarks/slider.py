"""How far a slider moves pictures along its axis: the mean of red minus blue, by multiplier, for the quickstart's.

    python train_leco.py --config_file configs/quickstart_slider.toml
    python -m benchmarks.slider output/quickstart-slider.safetensors

Renders 12 pictures of the target prompt at each multiplier, from the same noises, and prints their mean with its 95 %
interval, and that of the difference to the base's.
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
SEEDS = range(12)


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
        files = [Path(row["file"]) for row in csv.DictReader(file)]  # seed by seed
    for column in range(len(MULTIPLIERS)):
        yield files[column :: len(MULTIPLIERS)]


def in_words(values: list[float]) -> str:
    """The mean and half its 95 % interval (Student's t of 11 degrees of freedom: 2.2)."""
    return f"{statistics.mean(values):+.1f} ± {2.2 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def main(lora: str) -> None:
    """Print a line for each multiplier."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            multiplier: [redness(file) for file in files]
            for multiplier, files in zip(MULTIPLIERS, rendered(lora, Path(folder)), strict=True)
        }
    for multiplier, values in found.items():
        moved = [value - base for value, base in zip(values, found[0], strict=True)]
        print(f"{multiplier:+d}: red - blue {in_words(values)}, moved by {in_words(moved)}")


if __name__ == "__main__":
    main(sys.argv[1])
