"""What lies in a case's folder before its first command: images, captions, masks, files of settings.

Nothing here draws with the processor's arithmetic: pixels are copied, cut and repeated.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "quickstart" / "images"


def images(folder: Path, *, first: int = 0, count: int = 6) -> list[Path]:
    """Copy captioned images of the quickstart, 64 × 64."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = sorted((IMAGES / "train").glob("*.png"))[first : first + count]
    for image in chosen:
        shutil.copy(image, folder)
        shutil.copy(image.with_suffix(".txt"), folder)
    return [folder / image.name for image in chosen]


def plain(folder: Path) -> None:
    """Six images in `data/2_style`."""
    images(folder / "data" / "2_style")


def tags(folder: Path) -> None:
    """Captions of tags, marks, groups, wildcards and weights, two of them with a second line."""
    for i, image in enumerate(images(folder / "data" / "2_style")):
        more = "\nanother line, {x|y}" if i < 2 else ""
        text = f"icon {i} ||| red;;;round, {{flat|matte}}, (bright:1.4), soft{more}\n"
        image.with_suffix(".txt").write_text(text, encoding="utf-8")


def shapes(folder: Path) -> None:
    """Images of several shapes and sizes, for buckets and crops; one is transparent in part, one has 16 bits."""
    sizes = ((64, 64), (96, 48), (48, 96), (128, 64), (40, 60), (200, 100))
    for image, (width, height) in zip(images(folder / "data" / "2_style"), sizes, strict=True):
        with Image.open(image) as opened:
            tile = opened.convert("RGB")
        wide = Image.new("RGB", (width, height))
        for x in range(0, width, 64):
            for y in range(0, height, 64):
                wide.paste(tile, (x, y))
        wide.save(image)


def masks(folder: Path) -> None:
    """The left half transparent in the even images, and masks of the right half of each image in `masks`."""
    (folder / "masks").mkdir()
    for i, image in enumerate(images(folder / "data" / "2_style")):
        half = Image.new("L", (64, 64), 255)
        half.paste(0, (0, 0, 32, 64))
        half.save(folder / "masks" / image.name)
        if i % 2 == 0:
            with Image.open(image) as opened:
                cut = opened.convert("RGBA")
            cut.putalpha(half)
            cut.save(image)
    _dataset(folder, datasets=[_subset("data/2_style", conditioning_data_dir="masks", num_repeats=2, flip_aug=True)])


def several(folder: Path) -> None:
    """Two data sets of three folders, one of them regularisation images, each with its own settings."""
    images(folder / "photos", count=4)
    images(folder / "drawings", first=10, count=3)
    images(folder / "others", first=20, count=3)
    small = _subset("drawings", resolution=48, batch_size=1, shuffle_caption=True, keep_tokens=1, flip_aug=True)
    large = _subset("photos", resolution=32, batch_size=2, num_repeats=2, caption_prefix="photo of ")
    large["subsets"] += _subset("others", is_reg=True, class_tokens="emoji")["subsets"]
    _dataset(folder, datasets=[large, small])


def preserved(folder: Path) -> None:
    """Two folders, of which one is to look as without the network."""
    images(folder / "own", count=4)
    images(folder / "kept", first=10, count=2)
    data = _subset("own", resolution=32, batch_size=2)
    data["subsets"] += _subset("kept", custom_attributes={"diff_output_preservation": True})["subsets"]
    _dataset(folder, datasets=[data])


def held_out(folder: Path) -> None:
    """Ten images, enough to hold some back."""
    images(folder / "data" / "1_style", count=10)


def regularised(folder: Path) -> None:
    """Images, and regularisation images beside them in kohya's folders."""
    images(folder / "data" / "2_style cat")
    images(folder / "reg" / "1_cat", first=20, count=3)


def described(folder: Path) -> None:
    """Images without caption files, described in `meta.json`."""
    table = {}
    for i, image in enumerate(images(folder / "data")):
        image.with_suffix(".txt").unlink()
        table[image.name] = {"caption": f"icon {i}", "tags": "flat, bright", "train_resolution": [64, 64]}
    (folder / "meta.json").write_text(json.dumps(table), encoding="utf-8")


def prompted(folder: Path) -> None:
    """Six images and a file of prompts."""
    plain(folder)
    lines = (
        "emoji of cat --w 64 --h 64 --s 1 --d 5",
        "emoji of dog --n cat --w 72 --h 64 --s 2 --l 3 --d 7 --ss euler_a",
    )
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def settings(folder: Path) -> None:
    """Six images, and options in a TOML file."""
    plain(folder)
    text = """
[model]
pretrained_model_name_or_path = "BASE"
[training]
train_data_dir = "data"
caption_extension = ".txt"
resolution = "32,32"
train_batch_size = 3
learning_rate = 1e-3
text_encoder_lr = 5e-4
max_train_epochs = 2
seed = 7
max_data_loader_n_workers = 0
[network]
network_dim = 2
network_dropout = 0.1
[output]
output_dir = "out"
output_name = "from_file"
loss_plot = false
report = false
"""
    base = (ROOT / "quickstart" / "base").as_posix()
    (folder / "settings.toml").write_text(text.replace("BASE", base), encoding="utf-8")


def _subset(image_dir: str, **keys: object) -> dict[str, list[dict[str, object]]]:
    """A data set with one subset; what belongs to the data set stands there."""
    own = {key: keys.pop(key) for key in ("resolution", "batch_size") if key in keys}
    return {**own, "subsets": [{"image_dir": image_dir, "caption_extension": ".txt", **keys}]}  # type: ignore[dict-item]


def _dataset(folder: Path, **content: object) -> None:
    (folder / "data.json").write_text(json.dumps(content), encoding="utf-8")


WORLDS: dict[str, Callable[[Path], None]] = {
    made.__name__: made
    for made in (plain, tags, shapes, masks, several, preserved, held_out, regularised, described, prompted, settings)
}
