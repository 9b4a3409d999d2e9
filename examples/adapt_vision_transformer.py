"""Adapts a vision transformer to new classes: LoRA (transformers + peft) and CustomAdamW, with a preset's numbers.

    python examples/adapt_vision_transformer.py
    python examples/adapt_vision_transformer.py --model path/to/a/vit --images my_images --layer_decay 0.9

The folder of --images has one folder for each class, or images with captions whose last part is the class: "emoji of a
pie, food and drink". Without it drawn shapes are learnt, and without --model by a small model with random weights, in a
minute on a CPU. docs/language-models.md explains the options.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

from fine_tuning import optimizing, small_models
from library import rng
from library.data.quality.look import signature
from library.data.quality.near import near_groups
from library.errors import UserError, nearest_path, why_not

# where nothing else was given, for a model with random weights, whose patches, norms and head are trained as well
MADE = {"learning_rate": 5e-3, "batch_size": 32, "epochs": 12}
USUAL = {"batch_size": 16, "epochs": 10}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Labelled:
    """`pixels`: [N, 3, size, size] in [-1, 1]. `classes`: one name for each."""

    pixels: Tensor
    classes: list[str]

    def part(self, numbers: Sequence[int]) -> Labelled:
        return Labelled(self.pixels[list(numbers)], [self.classes[number] for number in numbers])


@dataclass(frozen=True)
class Quality:
    """Of held-out images: the mean loss, and the share that is classified right."""

    loss: float
    accuracy: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, {self.accuracy:.1%} right"


# -- images


def find_images(folder: Path) -> dict[Path, str]:
    """The images of a folder with their classes. Raises UserError for one without a class."""
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no folder{nearest_path(folder)}")
    found = {path: "" for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES}
    for path in found:
        caption = path.with_suffix(".txt")
        if caption.is_file():
            try:
                found[path] = caption.read_text(encoding="utf-8").rpartition(",")[2].strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{caption}: no UTF-8 text, at byte {error.start}") from None
        elif path.parent != folder:
            found[path] = path.parent.name
        if not found[path]:
            raise UserError(f"{path}: has no class: put it into a folder named so, or write {caption.name} beside it")
    if len(set(found.values())) < 2:
        raise UserError(f"--images {folder}: {len(found)} images of {len(set(found.values()))} classes; two are needed")
    return found


def load(images: dict[Path, str], size: int) -> Labelled:
    pixels = []
    for path in images:
        try:
            with Image.open(path) as image:
                small = ImageOps.exif_transpose(image).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        except (OSError, ValueError, UnidentifiedImageError) as error:
            raise UserError(f"{path}: no image can be read: {why_not(error)}") from None
        pixels.append(torch.from_numpy(np.asarray(small, np.float32) / 127.5 - 1).permute(2, 0, 1))
    return Labelled(torch.stack(pixels), list(images.values()))


def split(images: Labelled, share: float, *, seed: int) -> tuple[Labelled, Labelled]:
    """Images to learn, and about this share of each class to hold out. Those that look nearly alike are on one side."""
    pictures = ((images.pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    members: dict[int, list[int]] = {number: [number] for number in range(len(pictures))}
    for first, *others in near_groups(np.stack([signature(Image.fromarray(picture)) for picture in pictures])):
        for number in others:
            members[first] += members.pop(number)
    held: list[int] = []
    for name in sorted(set(images.classes)):
        of_class = [group for group in members.values() if images.classes[group[0]] == name]
        room = max(1, round(share * images.classes.count(name)))
        for group in sorted(of_class, key=lambda group: rng.key_of(seed, name, group[0])):
            if len(group) <= room:
                held += group
                room -= len(group)
    learnt = sorted(set(range(len(pictures))) - set(held))
    if {images.classes[number] for number in learnt} != set(images.classes) or not held:
        raise UserError("--held_out: a class has no images left to learn; more images or a smaller share are needed")
    return images.part(learnt), images.part(sorted(held))


def augmented(pixels: Tensor, *, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to an eighth of its size, and half of them mirrored."""
    far = pixels.shape[-1] // 8
    wide = torch.nn.functional.pad(pixels, (far,) * 4, mode="replicate")
    rows, columns = torch.randint(2 * far + 1, (2, len(pixels)), generator=generator).tolist()
    size = pixels.shape[-1]
    moved = [one[:, y : y + size, x : x + size] for one, y, x in zip(wide, rows, columns, strict=True)]
    flips = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.stack([one.flip(-1) if flip else one for one, flip in zip(moved, flips, strict=True)])


# -- model


def load_model(model: str | None, classes: list[str]) -> Any:
    """A model with a new head for these classes."""
    if model is None:
        return small_models.vision_transformer(classes)
    try:
        return AutoModelForImageClassification.from_pretrained(
            model, num_labels=len(classes), ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise optimizing.unloadable(model, error) from None


def with_adapter(base: Any, wanted: argparse.Namespace) -> Any:
    """LoRA on all linear layers. The new head learns as a whole; in a made model so do its patches and norms."""
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    head = "classifier"
    targets = sorted(name for name in linear if not name.startswith(head))
    model = get_peft_model(
        base,
        LoraConfig(
            r=wanted.rank, lora_alpha=wanted.alpha, lora_dropout=wanted.dropout, target_modules=targets,
            modules_to_save=[head],
        ),
    )  # fmt: skip
    if wanted.model is None:
        for name, parameter in model.named_parameters():
            if "embeddings" in name or "norm" in name:
                parameter.requires_grad_(True)
    return model


# -- training


@torch.no_grad()
def measure(model: Any, images: Labelled, names: list[str]) -> Quality:
    labels = torch.tensor([names.index(name) for name in images.classes], device=DEVICE)
    with rng.without_dropout(model):
        logits = torch.cat([model(pixel_values=part.to(DEVICE)).logits for part in images.pixels.split(64)])
    return Quality(cross_entropy(logits, labels).item(), (logits.argmax(-1) == labels).float().mean().item())


def batches(images: Labelled, names: list[str], wanted: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and labels without an end, every image once an epoch."""
    labels = torch.tensor([names.index(name) for name in images.classes])
    for epoch in itertools.count():
        generator = rng.torch_generator("images", wanted.seed, epoch)
        for chosen in torch.randperm(len(labels), generator=generator).split(wanted.batch_size):
            pixels = images.pixels[chosen]
            if wanted.augment:
                pixels = augmented(pixels, generator=generator)
            yield pixels.to(DEVICE), labels[chosen].to(DEVICE)


def train(wanted: argparse.Namespace) -> tuple[Quality, Quality]:
    """Reads, measures, trains, measures again. Raises UserError."""
    optimizing.check_optimizer_options(wanted)
    optimizing.make_folder(wanted.save_to)
    optimizing.fill(wanted, MADE if wanted.model is None else USUAL)
    found = None if wanted.images is None else find_images(wanted.images)
    names = sorted(set(small_models.SHAPES if found is None else found.values()))
    base = load_model(wanted.model, names).to(DEVICE)
    if not isinstance(side := getattr(base.config, "image_size", None), int):
        raise UserError(f"--model {wanted.model}: its configuration has no image_size, as a ViT's has")
    images = Labelled(*small_models.shapes(2000)) if found is None else load(found, side)
    learnt, held = split(images, wanted.held_out, seed=wanted.seed)
    print(f"{len(learnt.classes)} images of {len(names)} classes to learn, {len(held.classes)} held out")
    size = base.num_parameters()
    steps = wanted.steps or wanted.epochs * math.ceil(len(learnt.classes) / wanted.batch_size)
    torch.manual_seed(wanted.seed)
    model = with_adapter(base, wanted)
    print(optimizing.trained_share(model, of=size))
    own = optimizing.make(model, wanted, parameters=size, steps=steps, scheduler="linear")

    before = measure(model, held, names)
    model.train()
    for step, (pixels, labels) in enumerate(itertools.islice(batches(learnt, names, wanted), steps), 1):
        loss = cross_entropy(model(pixel_values=pixels).logits, labels)
        loss.backward()
        own.step()
        own.optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.4f}, weight decay {own.weight_decay():.4f}", flush=True)
    after = measure(model, held, names)
    print(f"held out, before: {before}\nheld out, after:  {after}")
    print(own.memory())
    if wanted.save_to is not None:
        model.save_pretrained(wanted.save_to)
        print(f"the adapter is in {wanted.save_to}; its classes are {', '.join(names)}")
    return before, after


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder or name (default: a small one with random weights)")
    parser.add_argument("--images", type=Path, help="a folder (default: drawn shapes)")
    parser.add_argument(
        "--held_out", type=optimizing.share_above_zero, default=0.2, help="share that is not learnt (0.2)"
    )
    parser.add_argument("--augment", action="store_true", help="shift and mirror images at random")
    parser.add_argument("--rank", type=optimizing.at_least_one, default=16)
    parser.add_argument("--alpha", type=optimizing.above_zero, default=32.0)
    parser.add_argument("--dropout", type=optimizing.share, default=0.05)
    parser.add_argument("--save_to", type=Path, help="a new folder for the adapter")
    optimizing.add_optimizer_options(parser, preset="vision_transformer_adapt", task=None)
    return optimizing.parsed(parser, argv)


def main(argv: list[str] | None = None) -> int:
    return optimizing.ended(lambda: train(options(argv)))


if __name__ == "__main__":
    sys.exit(main())
