"""Which method of merging keeps most of two styles? Two LoRAs of the quickstart's base model, one of each drawing
style, merged by each method, and measured on held-out images of both.

    python -m benchmarks.merge_methods FOLDER                 # four trainings, then merges: half an hour on one core
    python -m benchmarks.merge_methods FOLDER --seeds 1

The settings are those of configs/quickstart.toml for 8 epochs, which are 160 steps. Each pair of trainings has its own
seeds. FOLDER takes the files, and what is finished there is not made again. Prints a Markdown table: the differences to
the base model's loss by `lora-tools evaluate`, the mean of both styles and the worse one, averaged over the pairs; and
draws docs/images/tools-methods.png with some of the first pair's files.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STYLES = {"fluent": ROOT / "quickstart" / "images", "twemoji": ROOT / "benchmarks" / "data" / "twemoji"}
BASE = ROOT / "quickstart" / "base"
PICTURE = ROOT / "docs" / "images" / "tools-methods.png"
DRAWN = ("fluent alone", "twemoji alone", "linear, weights 0.5", "linear, weights 1", "slerp", "ties, weights 1")
PROMPTS = ("emoji of grinning cat, smileys and emotion", "emoji of broken heart, smileys and emotion")
EPOCHS = 8
SEED = 100  # of the first training
# by the name in the table: the options of merge; of the rank of both files together, unless the name says otherwise
METHODS = {
    "linear, weights 0.5": ("--weights", "0.5", "0.5"),
    "linear, weights 0.7": ("--weights", "0.7", "0.7"),
    "linear, weights 1": ("--weights", "1", "1"),
    "linear, weights 1, rank 8": ("--weights", "1", "1", "--rank", "8"),
    "slerp": ("--method", "slerp", "--rank", "16"),
    "ties, weights 1": ("--method", "ties", "--rank", "16"),
    "ties, weights 1, density 0.5": ("--method", "ties", "--density", "0.5", "--rank", "16"),
    "dare, weights 1, density 0.5": ("--method", "dare", "--density", "0.5", "--rank", "16"),
    "dare_ties, weights 1, density 0.5": ("--method", "dare_ties", "--density", "0.5", "--rank", "16"),
}


def main() -> None:
    """Train, merge, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=2, help="pairs of trainings")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [files(folder / f"pair{pair}", SEED + 2 * pair) for pair in range(options.seeds)]
    found = [measured(one) for one in pairs]
    print(f"| | {' | '.join(STYLES)} | mean | worse |\n|---|---|---|---|---|")
    for name in found[0]:
        by_style = [statistics.mean(one[name][style] for one in found) for style in STYLES]
        mean = statistics.mean(by_style)
        worse = statistics.mean(max(one[name].values()) for one in found)
        print(f"| {name} | {' | '.join(f'{value:+.2f} %' for value in (*by_style, mean, worse))} |")
    draw(pairs[0])


def files(folder: Path, seed: int) -> dict[str, Path]:
    """The LoRAs and their merges, by their names in the table. The pair's seeds: `seed` and the next."""
    folder.mkdir(exist_ok=True)
    names = {}
    for place, (style, images) in enumerate(STYLES.items()):
        names[f"{style} alone"] = folder / f"{style}.safetensors"
        if not names[f"{style} alone"].exists():
            train(folder, style, images / "train", seed + place)
    sources = list(names.values())
    for name, words in METHODS.items():
        names[name] = folder / f"{name.replace(',', '').replace(' ', '-')}.safetensors"
        if not names[name].exists():
            tool("merge", *sources, *words, "--save_to", names[name])
    return names


def measured(names: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """By file, and by style, the difference to the base model's loss in per cent."""
    folder = next(iter(names.values())).parent
    table = folder / "evaluation.csv"
    if not table.exists():
        held_out = [f"{style}={images / 'validation'}" for style, images in STYLES.items()]
        base = ("--pretrained_model_name_or_path", BASE, "--resolution", "64", "--batch_size", "8")
        tool("evaluate", *names.values(), *base, "--images", *held_out, "--output_dir", folder)
    by_file = read(table)
    return {name: by_file[path.stem] for name, path in names.items()}


def draw(names: Mapping[str, Path]) -> None:
    """Some of the files as a picture."""
    from PIL import Image

    shown = [names[name] for name in DRAWN]
    flags = "--w 64 --h 64 --s 25 --l 4 --d 1"
    words = ("--pretrained_model_name_or_path", BASE, "--prompt", *(f"{prompt} {flags}" for prompt in PROMPTS))
    folder = shown[0].parent
    tool("draw", *shown, *words, "--output_dir", folder, "--cell", 96, "--overwrite")
    Image.open(folder / "grid.png").convert("RGB").save(PICTURE, optimize=True)


def train(folder: Path, style: str, images: Path, seed: int) -> None:
    """One LoRA."""
    dataset = folder / f"{style}.toml"
    dataset.write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\nbatch_size = 8\n'
        f"[[datasets.subsets]]\nimage_dir = '{images}'\n",
        encoding="utf-8",
    )
    words = ["--config_file", ROOT / "configs" / "quickstart.toml", "--dataset_config", dataset]
    words += ["--pretrained_model_name_or_path", BASE, "--max_train_epochs", EPOCHS, "--seed", seed]
    words += ["--output_dir", folder, "--output_name", style, "--compare_prompts=", "--no-loss_plot", "--no-report"]
    run(sys.executable, ROOT / "train_network.py", *words)


def tool(*words: object) -> None:
    """One of the tools."""
    run(sys.executable, "-m", "networks.tools", *words)


def run(*words: object) -> None:
    """A process from its start to its end."""
    subprocess.run([str(word) for word in words], check=True, cwd=ROOT)


def read(table: Path) -> dict[str, dict[str, float]]:
    """By file and folder, the difference over all noise levels in per cent."""
    found: dict[str, dict[str, float]] = {}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["noise"] == "all":
                found.setdefault(row["lora"], {})[row["folder"]] = float(row["percent"])
    return found


if __name__ == "__main__":
    main()
