"""Writes the images with flaws of docs/data-check.md: `python -m docs.flawed_images FOLDER` makes FOLDER/1_fox of the
quickstart's. `docs.report_picture` takes the picture of their data check."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageFilter

EMOJI = Path(__file__).parents[1] / "quickstart" / "images" / "train"
SIDE = 256  # pixels

CAPTIONS = {
    "bell-pepper": "TODO",
    "beverage-box": "caption here",
    "black-heart": "zxemoji, cafÃ© au lait",
    "blackbird": "",
    "blossom": "zxemoji, " + ", ".join(f"petal {number} of many" for number in range(1, 31)),
    "boar": "a drawing of a boar without the trigger word",
}


def write(folder: Path) -> Path:
    """Twenty images of 256 × 256 pixels with captions that begin with "zxemoji", and then the flaws."""
    home = folder / "1_fox"
    home.mkdir(parents=True, exist_ok=True)
    drawings = sorted(EMOJI.glob("*.png"))[:20]
    for number, path in enumerate(drawings):
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
        if number in (2, 3):
            image = image.filter(ImageFilter.GaussianBlur(5))
        if number in (4, 5):
            image = image.resize((64, 64), Image.Resampling.BOX)
        image.save(home / path.name)
        caption = CAPTIONS.get(path.stem, f"zxemoji, {path.stem.replace('-', ' ')}")
        (home / f"{path.stem}.txt").write_text(f"{caption}\n", encoding="utf-8")
    with Image.open(home / drawings[12].name) as image:
        image.resize((200, 200)).save(home / "once-more.jpg", quality=70)
    (home / "once-more.txt").write_text("zxemoji, saved once more\n", encoding="utf-8")
    (home / "broken.png").write_bytes(b"<html>404 Not Found</html>")
    (home / "broken.txt").write_bytes("zxemoji, a caf\xe9".encode("latin-1"))
    return home


if __name__ == "__main__":
    print(f"written: {write(Path(sys.argv[1]))}")
