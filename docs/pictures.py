"""Makes the pictures of docs/data.md.

`python -m docs.pictures FOLDER` writes the images and data sets of that page into FOLDER, runs its commands there, and
puts what they draw into docs/images.
"""

from __future__ import annotations

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


if __name__ == "__main__":
    for picture in make(Path(sys.argv[1])):
        shutil.copy(picture, IMAGES)
