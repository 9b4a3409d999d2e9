"""Two LoRAs of the quickstart's base: one of UNet and text encoder, whose run was validated, and one of the UNet."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import IMAGES, copy_images, forget_accelerator, run_training

SEED = 7  # of the validation


class Trained(NamedTuple):
    folder: Path
    both: Path  # of UNet and text encoder
    unet: Path
    held_out: Path  # the images that its run was validated on


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    copy_images(folder / "data" / "1_style", 4)
    held_out = folder / "held_out"
    held_out.mkdir()
    for image in sorted((IMAGES / "report").glob("*.png"))[:3]:
        for path in (image, image.with_suffix(".txt")):
            (held_out / path.name).write_bytes(path.read_bytes())
    config = folder / "data.toml"
    config.write_text(
        f"""[[datasets]]
        resolution = 64
        batch_size = 2
        [[datasets.subsets]]
        image_dir = '{folder / "data" / "1_style"}'
        caption_extension = ".txt"
        validation_dir = '{held_out}'
        """
    )
    words = ("--dataset_config", str(config), "--train_data_dir=", "--learning_rate", "1e-2", "--overwrite")
    assert run_training(folder, *words, "--validation_seed", str(SEED), "--output_name", "both") == 0
    forget_accelerator()
    assert run_training(folder, *words, "--output_name", "unet", "--network_train_unet_only") == 0
    forget_accelerator()
    return Trained(folder, folder / "out" / "both.safetensors", folder / "out" / "unet.safetensors", held_out)
