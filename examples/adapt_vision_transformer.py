"""Adapts a vision transformer to new classes with LoRA (transformers + peft) and CustomAdamW, with a preset's numbers.

    python examples/adapt_vision_transformer.py
    python examples/adapt_vision_transformer.py --preset image_classification --model path/to/a/vit --images my_images

The class of an image is the last part of its caption: "emoji of a pie, food and drink". Without --model a small model
with random weights stands in: that shows the wiring, not what a real model gains. The preset says the optimizer's part;
the model, the data and the loop are this script's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, get_scheduler

from library.optimizers import CustomAdamW, preset_arguments

IMAGES = Path(__file__).parents[1] / "quickstart" / "images"


def load_images(folder: Path, *, size: int) -> tuple[torch.Tensor, list[str]]:
    """Pixels in [-1, 1], NCHW, and the class of each image."""
    paths = sorted(folder.glob("*.png"))
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((size, size)), np.float32) for path in paths]
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in paths]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1, [
        caption.rpartition(",")[2].strip() for caption in captions
    ]


def load_model(model: str | None, classes: list[str]) -> ViTForImageClassification:
    """A model with a new head for these classes."""
    if model is not None:
        return AutoModelForImageClassification.from_pretrained(
            model, num_labels=len(classes), ignore_mismatched_sizes=True
        )
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=len(classes), **small))


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train; the loss on images that were held out, before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder (default: a small one with random weights)")
    parser.add_argument("--images", type=Path, default=IMAGES, help="a folder with train/ and validation/")
    parser.add_argument("--preset", nargs="*", default=["vision_transformer_adapt"])
    parser.add_argument("--learning_rate", type=float, help="instead of the preset's")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=16)
    wanted = parser.parse_args(argv)
    torch.manual_seed(0)

    names = sorted(set(load_images(wanted.images / "train", size=1)[1]))
    base = load_model(wanted.model, names)
    size = base.config.image_size
    data = [load_images(wanted.images / part, size=size) for part in ("train", "validation")]
    (images, labels), (other_images, other_labels) = [
        (pixels, torch.tensor([names.index(name) for name in classes])) for pixels, classes in data
    ]
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    # the head is new, so all of it learns
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=layers, modules_to_save=["classifier"])
    model = get_peft_model(base, adapter)

    arguments = preset_arguments(*wanted.preset)
    if wanted.learning_rate is not None:
        arguments["lr"] = wanted.learning_rate
    # with their names, by which it finds the LoRA pairs
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = CustomAdamW(trained, **arguments)
    warmup = round(0.05 * wanted.steps)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=wanted.steps)

    def held_out_loss() -> float:
        with torch.no_grad():
            return cross_entropy(model(pixel_values=other_images).logits, other_labels).item()

    before = held_out_loss()
    for step in range(1, wanted.steps + 1):
        chosen = torch.randint(len(images), (wanted.batch_size,))
        loss = cross_entropy(model(pixel_values=images[chosen]).logits, labels[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in trained], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            decay = optimizer.get_optimization_info()["weight_decay"][0]
            print(f"step {step}: loss {loss.item():.4f}, weight decay {decay:.4f}")
    after = held_out_loss()
    print(f"held-out loss {before:.4f} before, {after:.4f} after")
    return before, after


if __name__ == "__main__":
    main()
