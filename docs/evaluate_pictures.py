"""Makes the pictures of docs/evaluate.md: `python -m docs.evaluate_pictures FOLDER` runs the page's commands there, on
the quickstart, and puts what they draw into docs/images. About a quarter of an hour on one core."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
# in docs/images: below the folder of the commands
PICTURES = {
    "evaluation.png": "output/evaluation.png",
    "grid.png": "output/grid.png",
    "find-rank.png": "output/quickstart-ranks/find-rank.png",
}
FEW = 8  # images that the second LoRA of the page is trained on


def commands() -> list[list[str]]:
    """The words of each of the page's commands."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("python ")]


def write_files(folder: Path) -> None:
    """The files that the page's commands name: `few/1_few`, images of the quickstart, and the prompts."""
    few = folder / "few" / "1_few"
    few.mkdir(parents=True, exist_ok=True)
    for image in sorted((folder / "quickstart" / "images" / "train").glob("*.png"))[:FEW]:
        for path in (image, image.with_suffix(".txt")):
            shutil.copy(path, few)
    for block in re.findall(r"```text\n(# prompts\.txt\n.*?)```", PAGE, flags=re.DOTALL):
        (folder / "prompts.txt").write_text(block, encoding="utf-8")


def make(folder: Path) -> None:
    """Run the commands in `folder`, and put the pictures into docs/images."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("quickstart", "configs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    write_files(folder)
    for words in commands():
        path = ROOT / words[1] if words[1].endswith(".py") else words[1]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, str(path), *words[2:]], cwd=folder, check=True, env=environment)
    for name, picture in PICTURES.items():
        image = Image.open(folder / picture).convert("RGB")
        if name != "grid.png":  # plots have few colours
            image = image.quantize(96, dither=Image.Dither.NONE)
        image.save(ROOT / "docs" / "images" / name, optimize=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
