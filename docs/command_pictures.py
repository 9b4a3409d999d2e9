"""Makes the pictures of docs/evaluate.md and docs/tools.md, on the quickstart.

`python -m docs.command_pictures tools FOLDER` runs the page's commands there, prints what they print, and puts what
they draw into docs/images. About a quarter of an hour on one core for evaluate, some minutes for tools.
"""

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
# by page: the names in docs/images, and where the commands write
PICTURES = {
    "evaluate": {
        "evaluation.png": "output/evaluation.png",
        "grid.png": "output/grid.png",
        "find-rank.png": "output/quickstart-ranks/find-rank.png",
    },
    "tools": {
        "tools-advice.png": "output/advice.png",
        "tools-ranks.png": "output/ranks.png",
    },
}
FEW = 8  # images that the second LoRA of evaluate is trained on


def text_of(page: str) -> str:
    """The page."""
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    """The words of each of the page's commands."""
    blocks = re.findall(r"```sh\n(.*?)```", text_of(page), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("python ")]


def write_files(folder: Path) -> None:
    """The files that evaluate's commands name: `few/1_few`, images of the quickstart, and the prompts."""
    few = folder / "few" / "1_few"
    few.mkdir(parents=True, exist_ok=True)
    for image in sorted((folder / "quickstart" / "images" / "train").glob("*.png"))[:FEW]:
        for path in (image, image.with_suffix(".txt")):
            shutil.copy(path, few)
    for block in re.findall(r"```text\n(# prompts\.txt\n.*?)```", text_of("evaluate"), flags=re.DOTALL):
        (folder / "prompts.txt").write_text(block, encoding="utf-8")


def make(page: str, folder: Path) -> None:
    """Run the commands in `folder`, and put the pictures into docs/images."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("quickstart", "configs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    write_files(folder)
    for words in commands(page):
        print(f"\n> {shlex.join(words)}", flush=True)
        path = ROOT / words[1] if words[1].endswith(".py") else words[1]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, str(path), *words[2:]], cwd=folder, check=True, env=environment)
    for name, picture in PICTURES[page].items():
        image = Image.open(folder / picture).convert("RGB")
        if name != "grid.png":  # plots have few colours
            image = image.quantize(96, dither=Image.Dither.NONE)
        image.save(ROOT / "docs" / "images" / name, optimize=True)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
