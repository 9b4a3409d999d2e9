"""Two LoRAs of the quickstart's base: one of UNet and text encoder, whose run was validated, and one of the UNet."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import IMAGES, copy_images, forget_accelerator, run_training

SEED = 7  # of the validation
PROMPT = "emoji of grinning cat --w 64 --h 64 --s 2 --l 4 --n angry"


class Trained(NamedTuple):
    folder: Path
    both: Path  # of UNet and text encoder
    unet: Path
    held_out: Path  # the images that its run was validated on

    @property
    def samples(self) -> list[Path]:
        """Of the run of `both` after its last step: of a prompt with a seed, and of one without."""
        return sorted(path for path in (self.folder / "out" / "sample").glob("both_000004_*.png"))

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.txt"


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
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{PROMPT} --d 3\n{PROMPT}\n")
    samples = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "4")
    words = ("--dataset_config", str(config), "--train_data_dir=", "--learning_rate", "1e-2", "--overwrite")
    own = (*words, "--validation_seed", str(SEED), "--output_name", "both", *samples)
    assert run_training(folder, *own) == 0
    forget_accelerator()
    assert run_training(folder, *words, "--output_name", "unet", "--network_train_unet_only") == 0
    forget_accelerator()
    return Trained(folder, folder / "out" / "both.safetensors", folder / "out" / "unet.safetensors", held_out)
