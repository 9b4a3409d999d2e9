"""Masks and augmentations through the real command line: what is masked teaches nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from library.config.parser import parse
from library.run.build import build
from library.run.plan import make_plan
from library.training import loop
from library.training.step import batch_loss
from tests.conftest import BASE
from tests.training.written import ROUNDED, distance, same, weights


@pytest.fixture
def alpha_folder(image_folder: Path) -> Path:
    """The images of `image_folder` with the left half transparent, the drawings still stored beneath."""
    for path in image_folder.glob("*/*.png"):
        rgba = np.asarray(Image.open(path).convert("RGBA")).copy()
        rgba[:, :32, 3] = 0
        Image.fromarray(rgba).save(path)
    return image_folder


def dataset_config(folder: Path, images: Path, **keys: object) -> Path:
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    subset = ["[[datasets.subsets]]", f'image_dir = "{images.as_posix()}"', 'caption_extension = ".txt"', *lines]
    path = folder / "data.toml"
    path.write_text("\n".join(["[[datasets]]", "resolution = 64", "batch_size = 2", *subset]), encoding="utf-8")
    return path


def test_the_masked_loss_is_the_mean_over_all_elements(alpha_folder: Path, tmp_path: Path) -> None:
    words = (
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(alpha_folder), "--resolution", "64"),
        *("--caption_extension", ".txt", "--train_batch_size", "3", "--output_dir", str(tmp_path / "out")),
        *("--max_train_steps", "1", "--seed", "3", "--alpha_mask", "--max_data_loader_n_workers", "0"),
    )
    run = build(make_plan(parse(list(words))))
    (batch,) = next(loop.step_batches(run)).batches
    half = torch.zeros(3, 1, 64, 64)
    half[..., 32:] = 1
    assert torch.equal(batch.masks, half)

    def loss(masks: torch.Tensor | None) -> float:
        batch.masks = masks
        device = torch.device("cpu")
        return batch_loss(batch, run.family, run.objective, seed=3, device=device, train_text=False).loss.item()

    whole, right, left = loss(None), loss(half), loss(1 - half)
    assert 0 < right < whole
    assert left + right == pytest.approx(whole, rel=1e-6)
    assert loss(half / 4) == pytest.approx(right / 4, rel=1e-6)
    assert loss(half[..., ::4, ::4]) == pytest.approx(right, rel=1e-6)  # of the latents' size
    assert loss(torch.ones(3, 1, 64, 64)) == pytest.approx(whole, rel=1e-6)
    assert loss(torch.zeros(3, 1, 64, 64)) == 0


def test_alpha_masks_and_mask_files_train_alike_cached_or_not(train, tmp_path, alpha_folder):
    (images,) = alpha_folder.iterdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "drawings").mkdir()
    for path in images.glob("*.png"):
        rgba = Image.open(path)
        rgba.getchannel("A").save(tmp_path / "masks" / path.name)
        rgba.convert("RGB").save(tmp_path / "drawings" / path.name)
        (tmp_path / "drawings" / f"{path.stem}.txt").write_text(path.with_suffix(".txt").read_text(encoding="utf-8"))
    common = ("--flip_aug", "--max_train_steps", "2", "--output_name")
    files = dataset_config(tmp_path, tmp_path / "drawings", conditioning_data_dir=str(tmp_path / "masks"))
    assert train(*common, "files", "--dataset_config", str(files), "--masked_loss") == 0
    alpha = dataset_config(tmp_path, images, alpha_mask=True)
    assert train(*common, "alpha", "--dataset_config", str(alpha)) == 0
    assert train(*common, "fresh", "--dataset_config", str(alpha), "--no-cache_latents") == 0
    assert same(weights(tmp_path, "alpha"), weights(tmp_path, "files"))
    # the batch that goes through the VAE has another size
    assert distance(weights(tmp_path, "alpha"), weights(tmp_path, "fresh")) < ROUNDED


def test_what_is_wholly_masked_teaches_nothing(train, tmp_path, image_folder):
    for path in image_folder.glob("*/*.png"):
        image = Image.open(path).convert("RGBA")
        image.putalpha(0)
        image.save(path)
    assert train("--alpha_mask") == 0
    ups = [tensor for key, tensor in weights(tmp_path, "test").items() if key.endswith("lora_up.weight")]
    assert all(up.abs().max() == 0 for up in ups)


def recorded(folder: Path, name: str) -> dict[str, str]:
    with safe_open(folder / "out" / f"{name}.safetensors", framework="pt") as file:
        return file.metadata()


@pytest.mark.slow
def test_augmentations_train_the_same_bits_for_the_same_seed(train, tmp_path):
    plain = ("--no-cache_latents", "--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "8")
    augmented = (*plain, "--random_crop", "--color_aug", "--resolution", "64,56", "--max_train_steps", "6")
    assert train(*augmented, "--output_name", "a") == 0
    assert train(*augmented, "--output_name", "b", "--max_data_loader_n_workers", "1") == 0
    assert same(weights(tmp_path, "a"), weights(tmp_path, "b"))
    facts = recorded(tmp_path, "a")
    assert (facts["ss_random_crop"], facts["ss_color_aug"]) == ("True", "True")


@pytest.mark.slow
def test_the_filter_is_used_and_recorded(train, tmp_path):
    for name in ("bicubic", "area"):
        words = ("--resize_interpolation", name, "--resolution", "48", "--max_train_steps", "2")
        assert train(*words, "--output_name", name) == 0
        assert recorded(tmp_path, name)["ss_resize_interpolation"] == name
    assert not same(weights(tmp_path, "bicubic"), weights(tmp_path, "area"))


def test_face_crops_train(train, tmp_path, image_folder):
    for path in sorted(image_folder.glob("*/*.png")):
        path.rename(path.with_name(f"{path.stem}_32_30_20_20.png"))
    words = ("--face_crop_aug_range", "1.0,3.0", "--resolution", "32", "--no-cache_latents")
    assert train(*words, "--output_name", "face") == 0
    assert recorded(tmp_path, "face")["ss_face_crop_aug_range"] == "(1.0, 3.0)"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--random_crop"], "cache_latents and random_crop exclude each other"),
        (["--color_aug"], "cache_latents and color_aug exclude each other"),
        (["--masked_loss"], "--masked_loss: there are no masks"),
        (["--face_crop_aug_range", "2,4", "--no-cache_latents"], "has a face in its name"),
        (["--resize_interpolation", "linar"], "did you mean 'linear'?"),
        (["--debug_dataset", "--dry_run"], "--dry_run and --debug_dataset: give one of them"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refused_before_training(train, capsys, tmp_path, words, said):
    assert train(*words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
