"""A tiny model of each family that is trained by flow matching, with random weights, learns eight images: its
transformer, its file and its objective as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.models.opening import open_family
from networks.create import create_to_merge
from networks.files import read
from tests.conftest import IMAGES
from tests.flow_families import ROWS, FlowFamily

IMAGE_COUNT = 8
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def learnt(folder: Path) -> list[Path]:
    """Eight images with their captions, once each in an epoch."""
    target = folder / "data" / "1_emoji"
    target.mkdir(parents=True)
    images = sorted((IMAGES / "train").glob("*.png"))[:IMAGE_COUNT]
    for image in images:
        shutil.copy(image, target)
        shutil.copy(image.with_suffix(".txt"), target)
    return images


def losses_of(family: Any, images: list[Path], *, seed: int) -> tuple[float, float]:
    """The mean squared error of the velocity over all images and levels, with noise that training never draws, and what
    it is of the answer 0."""
    captions = [image.with_suffix(".txt").read_text(encoding="utf-8").strip() for image in images]
    pixels = torch.stack([_pixels(image) for image in images])
    with torch.no_grad():
        latents, _ = family.encode_images(pixels)
        texts = family.encode_prompts(captions)
        count = len(images)
        sizes: Any = {"original_sizes": [(64, 64)] * count, "crops": [(0, 0)] * count, "target_size": (64, 64)}
        condition = family.condition(texts, **sizes)
        generator, errors = torch.Generator().manual_seed(seed), []
        for level in LEVELS:
            noise = torch.randn(latents.shape, generator=generator)
            level_B = torch.full((count,), level)
            found = family.predict(family.process.noisy(latents, noise, level_B), level_B, condition)
            target = family.process.target(latents, noise, level_B)
            errors.append(torch.stack([(found - target).square().mean(), target.square().mean()]))
    loss, of_nothing = torch.stack(errors).mean(dim=0).tolist()
    return loss, of_nothing


def _pixels(path: Path) -> Tensor:
    image = Image.open(path).convert("RGB").resize((64, 64))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def losses_before_and_after(
    main: Callable[[list[str]], int], model: Path, folder: Path, *more: str, options: dict[str, Any] | None = None
) -> tuple[float, float, float]:
    """Of a model that is trained by 300 steps on all of the images, and of the answer 0. `more`, `options`: of the
    command line and of the family."""
    images = learnt(folder)
    family = open_family(str(model), options=options)
    family.components.load_all(family.PARTS, torch.float32, "cpu")
    before, of_nothing = losses_of(family, images, seed=12345)
    words = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder / "data")]
    words += ["--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "8", "--seed", "1"]
    words += ["--output_dir", str(folder / "out"), "--output_name", "test", "--no-loss_plot", "--no-report"]
    words += ["--network_dim", "32", "--network_alpha", "32", "--learning_rate", "1e-2", "--lr_scheduler", "cosine"]
    words += ["--network_train_unet_only", "--cache_text_encoder_outputs", "--cache_latents"]
    words += ["--timestep_sampling", "uniform", "--max_train_steps", "300", "--max_data_loader_n_workers", "0"]
    assert main([*words, *more]) == 0
    file = read(folder / "out" / "test.safetensors")
    network = create_to_merge(file, family.adapter_targets(), multiplier=1.0)
    network.load(file)
    network.merge()
    after, _ = losses_of(family, images, seed=12345)
    return before, after, of_nothing


@pytest.mark.slow
@pytest.mark.parametrize("family", ROWS, ids=str)
def test_the_loss_on_new_noise_falls(family: FlowFamily, model: Path, tmp_path: Path) -> None:
    """To less than a part of what it was, and of the loss of predicting nothing: the velocity's mean square."""
    main, tokens = import_module(family.door).main, family.learning_tokens
    more, options = family.short(tokens), family.options(tokens)
    before, after, of_nothing = losses_before_and_after(main, model, tmp_path, *more, options=options)
    assert after < family.falls_to * before, f"{before:.3f} → {after:.3f}"
    assert after < family.falls_to_of_nothing * of_nothing, f"{after:.3f} of {of_nothing:.3f}"
