"""Makes the pictures of docs/data.md, docs/optimizer.md and docs/presets.md.

`python -m docs.pictures FOLDER` writes the images and data sets of docs/data.md into FOLDER, runs its commands there,
and puts what they draw into docs/images; the curves of the weight decay and the rate finder's plot of the quickstart,
too.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from train_network import main

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
PAGE = (DOCS / "data.md").read_text(encoding="utf-8")
EMOJI = DOCS.parent / "quickstart" / "images" / "train"
SIDE = 256  # pixels of one drawing


def blocks(language: str) -> list[str]:
    """The page's code in this language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """The words behind train_network.py in each of the page's commands."""
    lines = [line for block in blocks("sh") for line in block.replace(" \\\n", " ").splitlines()]
    return [shlex.split(line)[2:] for line in lines if line.startswith("python train_network.py")]


def strip(names: list[str], *, upright: bool = False) -> Image.Image:
    """Drawings side by side, or one above the other."""
    count = len(names)
    image = Image.new("RGB", (SIDE, count * SIDE) if upright else (count * SIDE, SIDE), "white")
    for number, name in enumerate(names):
        drawing = Image.open(EMOJI / f"{name}.png").convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.paste(drawing, (0, number * SIDE) if upright else (number * SIDE, 0))
    return image


def save(image: Image.Image, path: Path, caption: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    path.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")


def write_examples(folder: Path) -> None:
    """The images that the page's data sets name, and the data sets."""
    shapes = folder / "shapes"
    save(strip(["owl", "camel", "goat"]), shapes / "row.png", "flat emoji, an owl, a camel and a goat in a row")
    save(strip(["tomato", "pie"]), shapes / "pair.png", "flat emoji, a tomato and a pie")
    save(strip(["robot"]), shapes / "square.png", "flat emoji, a robot")
    save(strip(["penguin", "parrot"], upright=True), shapes / "column.png", "flat emoji, a penguin above a parrot")
    save(strip(["waffle", "taco"]).crop((0, 0, 400, SIDE)), shapes / "odd.png", "flat emoji, a waffle and half a taco")
    save(strip(["egg"]).resize((50, 50)), shapes / "small.png", "flat emoji, an egg")
    save(strip(["nerd-face", "crab"]), folder / "scenes" / "two.png", "flat emoji, a nerd, a crab, white background")
    owl = strip(["owl"])
    owl.putalpha(owl.convert("L").point(lambda value: 0 if value > 250 else 255))
    save(owl, folder / "cut_out" / "owl.png", "flat emoji, an owl")
    save(strip(["owl", "camel", "goat"]), folder / "marked" / "row.png", "flat emoji, a camel")
    mask = Image.new("L", (3 * SIDE, SIDE), "black")
    ImageDraw.Draw(mask).ellipse((SIDE, 0, 2 * SIDE, SIDE), fill="white")
    (folder / "marked_masks").mkdir(exist_ok=True)
    mask.save(folder / "marked_masks" / "row.png")
    for block in blocks("toml"):
        (folder / block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")


def make(folder: Path) -> list[Path]:
    """Write the examples, run the page's commands, and return the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_examples(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for words in commands():
            words = [str(DOCS.parent / word) if word == "quickstart/base" else word for word in words]
            assert main(words) == 0, words
    finally:
        os.chdir(before)
    return sorted((folder / "output").glob("*-dataset.png"))


def weight_decay(path: Path) -> None:
    """The shapes that a falling weight decay can have, and those of the presets, over 5000 steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from library.optimizers import preset_arguments
    from library.optimizers.weight_decay import Curve

    shapes = {
        "exponential": Curve(),
        "exponential, wd_max_progress inf": Curve(max_progress=math.inf),
        "cosine": Curve("cosine"),
        "sigmoid": Curve("sigmoid"),
        "linear": Curve("linear"),
        "multi_stage 1000:0.7,3000:0.4": Curve("multi_stage", stages=((0, 1.0), (1000, 0.7), (3000, 0.4))),
    }
    names = (
        *("conservative", "language_model_finetune", "default", "image_classification", "stable_diffusion_lora"),
        "aggressive",
    )
    presets = {}
    for name in names:
        numbers = preset_arguments(name)
        presets[name] = Curve(
            **{key: numbers[f"wd_{key}"] for key in ("transition_steps", "decay_factor", "min_ratio")}
        )
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("shapes", shapes), ("presets", presets))
    for axes, (title, curves) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for label, curve in curves.items():
            steps = range(1, 5001, 5)
            axes.plot(steps, [curve.factor(step) for step in steps], label=label)
        axes.set(title=title, xlabel="optimizer step", ylim=(0, 1.05), xlim=(0, 5000))
        axes.legend(frameon=False, fontsize="small", loc="lower left")
        axes.grid(color="0.92")
    figure.axes[0].set_ylabel("share of the weight decay")
    figure.savefig(path, dpi=100, format="png")


def rate_finder(folder: Path) -> Path:
    """The plot that the rate finder draws of the quickstart, as docs/presets.md says to call it."""
    before = Path.cwd()
    os.chdir(DOCS.parent)
    try:
        assert main(["--config_file", "configs/quickstart.toml", "--find_lr", "--output_dir", str(folder)]) == 0
    finally:
        os.chdir(before)
    return folder / "quickstart-find-lr.png"


if __name__ == "__main__":
    for picture in (*make(Path(sys.argv[1])), rate_finder(Path(sys.argv[1]))):
        shutil.copy(picture, IMAGES)
    weight_decay(IMAGES / "weight-decay.png")
